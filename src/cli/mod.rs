//! Shared flags and units, progress line, JSON events, exit codes.
