//! The 16550 serial port at 0x3f8 (COM1), interrupt 4.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_ioctls::VmFd;
use vm_superio::serial::{SerialEvents, SerialState as ChipState};
use vm_superio::{Serial, Trigger};

use super::SerialBackend;
use super::backend::{Keep, Opened};
use super::input::{self, Gate};
use super::output::{Output, Writer};
use crate::state::SerialState;
use crate::vmm::VmmError;

/// The ports of COM1.
pub const COM1_PORTS: std::ops::RangeInclusive<u16> = 0x3f8..=0x3ff;
/// The interrupt of COM1.
pub const COM1_IRQ: u32 = 4;

/// Pulses the interrupt line. The ioctl is synchronous, unlike an irqfd, whose work may still be
/// on its way when the interrupt controllers are saved.
#[derive(Clone)]
struct Line {
    vm: Arc<VmFd>,
    muted: Arc<AtomicBool>,
}

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        if self.muted.load(Ordering::SeqCst) {
            return Ok(());
        }
        let set = |active| {
            self.vm.set_irq_line(COM1_IRQ, active).map_err(|e| io::Error::from_raw_os_error(e.errno()))
        };
        set(true)?;
        set(false)
    }
}

/// Tells the input thread that the guest has room again.
#[derive(Clone)]
struct Events(Arc<Gate>);

impl SerialEvents for Events {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.ring();
    }
}

type Chip = Serial<Line, Events, Output>;

/// The port with its backend.
pub struct SerialPort {
    chip: Arc<Mutex<Chip>>,
    line: Line,
    gate: Arc<Gate>,
    output: Output,
    writer: Mutex<Writer>,
    input: Mutex<Option<std::fs::File>>,
    reader: Mutex<Option<JoinHandle<()>>>,
    path: Option<PathBuf>,
    _keep: Mutex<Keep>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SerialPort {
    /// Opens the backend. Nothing goes in or out before [`SerialPort::connect`].
    pub fn new(vm: Arc<VmFd>, backend: &SerialBackend) -> Result<Self, VmmError> {
        let Opened { output, lossy, input, path, keep } = backend.open()?;
        let fail = |source| VmmError::Serial { backend: backend.to_string(), source };
        let (output, writer) = Output::start(output, lossy).map_err(fail)?;
        let gate = Arc::new(Gate::new().map_err(fail)?);
        let line = Line { vm, muted: Arc::new(AtomicBool::new(false)) };
        let chip = Serial::with_events(line.clone(), Events(Arc::clone(&gate)), output.clone());
        Ok(Self {
            chip: Arc::new(Mutex::new(chip)),
            line,
            gate,
            output,
            writer: Mutex::new(writer),
            input: Mutex::new(input),
            reader: Mutex::new(None),
            path,
            _keep: Mutex::new(keep),
        })
    }

    /// The pseudo-terminal that was made for it, if any.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The guest reads a register (0 to 7).
    pub fn read(&self, register: u8) -> u8 {
        lock(&self.chip).read(register)
    }

    /// The guest writes to a register (0 to 7); several bytes are one `rep outs` to the same one.
    pub fn write(&self, register: u8, bytes: &[u8]) {
        let mut chip = lock(&self.chip);
        for byte in bytes {
            if let Err(e) = chip.write(register, *byte) {
                tracing::warn!("serial port: {e:?}");
            }
        }
    }

    /// The machine runs: input flows, and output waits for its reader.
    pub fn connect(&self) -> Result<(), VmmError> {
        lock(&self.writer).set_passing(false);
        self.gate.set_open(true);
        let Some(file) = lock(&self.input).take() else { return Ok(()) };
        let (room, deliver, gate) = (Arc::clone(&self.chip), Arc::clone(&self.chip), Arc::clone(&self.gate));
        let thread = input::start(
            file,
            Arc::clone(&self.gate),
            move || lock(&room).fifo_capacity(),
            move |bytes| {
                let mut chip = lock(&deliver);
                match gate.is_open() {
                    true => chip.enqueue_raw_bytes(bytes).unwrap_or(0),
                    false => 0,
                }
            },
        );
        *lock(&self.reader) = Some(thread.map_err(VmmError::Thread)?);
        Ok(())
    }

    /// The machine is about to pause: no more input, and no vCPU waits for the output's reader.
    pub fn disconnect(&self) {
        self.gate.set_open(false);
        lock(&self.writer).set_passing(true);
    }

    /// Waits for a moment until what the guest has printed is written. To be called when it no
    /// longer prints.
    pub fn drain(&self) {
        self.output.drain();
    }

    /// The chip's state.
    pub fn save(&self) -> SerialState {
        let s = lock(&self.chip).state();
        SerialState {
            baud_divisor_low: s.baud_divisor_low,
            baud_divisor_high: s.baud_divisor_high,
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            in_buffer: s.in_buffer,
        }
    }

    /// Replaces the chip's state. An interrupt that was pending is in the saved interrupt
    /// controllers, so it is not raised again here.
    pub fn restore(&self, s: &SerialState) -> Result<(), VmmError> {
        let state = ChipState {
            baud_divisor_low: s.baud_divisor_low,
            baud_divisor_high: s.baud_divisor_high,
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            in_buffer: s.in_buffer.clone(),
        };
        let mut chip = lock(&self.chip);
        self.line.muted.store(true, Ordering::SeqCst);
        let new = Serial::from_state(
            &state,
            self.line.clone(),
            Events(Arc::clone(&self.gate)),
            self.output.clone(),
        );
        self.line.muted.store(false, Ordering::SeqCst);
        *chip =
            new.map_err(|e| VmmError::Content { section: "serial 0".into(), reason: format!("{e:?}") })?;
        Ok(())
    }

    /// Ends the threads; output that is queued is written if its reader reads.
    pub fn close(&self) {
        self.gate.set_open(false);
        self.gate.quit();
        if let Some(thread) = lock(&self.reader).take() {
            let _ = thread.join();
        }
        lock(&self.writer).close();
    }
}

impl Drop for SerialPort {
    fn drop(&mut self) {
        self.close();
    }
}
