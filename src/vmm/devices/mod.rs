//! Emulated devices: a serial port, and the ports by which a guest resets or powers off.

mod backend;
mod bus;
mod input;
mod output;
mod serial;

pub use backend::SerialBackend;
pub use bus::Bus;
pub use serial::{COM1_IRQ, COM1_PORTS, SerialPort};
