//! What virtio devices are made of, apart from their transport: the network card's frames, queues and
//! tap, and the streams of a socket device.

pub mod net;
pub mod vsock;

/// Whether `text` may be the id of a device.
pub fn is_device_id(text: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    !text.is_empty() && text.len() <= 32 && text.chars().all(fits)
}
