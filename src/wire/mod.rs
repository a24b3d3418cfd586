//! The stream format: frames, messages, limits. No sockets in here.
