//! Emulated devices: a serial port, and the ports by which a guest resets or powers off.

mod backend;
mod bus;
mod input;
mod output;
mod serial;

pub use backend::SerialBackend;
pub use bus::{Bus, RESET_CONTROL, RESET_CONTROL_CPU, SLEEP_CONTROL, SLEEP_STATUS};
pub use serial::{COM1_IRQ, COM1_PORTS, SerialPort};
