//! Byte streams between two hosts: addresses, connecting, deadlines, framed channels.
//!
//! A [`Stream`] is a connection of any kind (TCP, Unix, a child's pipes, stdin and stdout); a
//! [`Channel`] is a stream that speaks frames for one [`crate::switchover::Attempt`], and splits into a
//! [`Sender`] and a [`Receiver`] for two threads. Whoever waits here waits for a [`CancelToken`] as
//! well, so one call ends every wait of an attempt.

mod address;
mod cancel;
mod channel;
mod connect;
mod error;
mod exec;
mod frame_io;
mod keepalive;
mod rate;
mod receiver;
mod sender;
mod stream;
mod tcp;
mod unix;

#[cfg(test)]
mod channel_tests;
#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod stream_tests;
#[cfg(test)]
pub(crate) mod testing;

pub use address::{Address, AddressError, needs_insecure};
pub use cancel::CancelToken;
pub use channel::{Channel, ChannelOptions, ChannelRole, ChannelStats};
pub use connect::{Listener, connect};
pub use error::{ChannelError, StreamError};
pub use exec::program;
pub use keepalive::Heartbeat;
pub use rate::RateLimiter;
pub use receiver::{Frame, PagesFrame, Receiver};
pub use sender::Sender;
pub use stream::{ReadHalf, Stream, WriteHalf};
