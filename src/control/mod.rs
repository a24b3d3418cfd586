//! The control socket: JSON lines on a Unix stream socket, file descriptors by SCM_RIGHTS.
