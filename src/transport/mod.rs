//! Byte streams between two hosts: addresses, connecting, deadlines, framed channels.
