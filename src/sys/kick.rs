//! Kicking a thread out of `KVM_RUN` without losing a kick.
//!
//! A signal that arrives just before the thread enters `KVM_RUN` would be gone when it gets there.
//! So its handler sets `immediate_exit` in the thread's `kvm_run` page, which makes the next
//! `KVM_RUN` return `EINTR` at once (KVM API, section 5, `immediate_exit`). The handler finds the
//! page through a thread-local pointer.

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::OnceLock;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    /// `&kvm_run.immediate_exit` of the vCPU that this thread runs, or null.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// The real-time signal for kicks, counted from SIGRTMIN.
const KICK_OFFSET: libc::c_int = 3;

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // `try_with`: the thread may be past the end of its thread-locals. The cell has a constant
    // initialiser and no destructor, so the access takes no lock and allocates nothing.
    let _ = IMMEDIATE_EXIT.try_with(|cell| {
        let flag = cell.get();
        if !flag.is_null() {
            // SAFETY: the pointer was set by this very thread from a `kvm_run` mapping that stays
            // until the `KickGuard`, which nulls the pointer, is dropped. Volatile, since the
            // kernel and the interrupted code read it behind the compiler's back.
            unsafe { flag.write_volatile(1) };
        }
    });
}

/// Installs the handler for the kick signal, once in a process.
pub fn install_handler() -> io::Result<()> {
    static RESULT: OnceLock<Result<(), i32>> = OnceLock::new();
    RESULT
        .get_or_init(|| register_signal_handler(SIGRTMIN() + KICK_OFFSET, on_kick).map_err(|e| e.errno()))
        .map_err(io::Error::from_raw_os_error)
}

/// While it lives, kicks to this thread reach the vCPU that it was made for.
pub struct KickGuard {
    _not_send: std::marker::PhantomData<*mut u8>,
}

impl KickGuard {
    /// Points this thread's kicks at `vcpu`, and blocks them until [`KickGuard::allow`]. The guard
    /// has to be dropped before `vcpu` is: keep it in the scope that owns the vCPU.
    pub fn new(vcpu: &mut VcpuFd) -> io::Result<Self> {
        change_mask(libc::SIG_BLOCK)?;
        let flag = ptr::addr_of_mut!(vcpu.get_kvm_run().immediate_exit);
        IMMEDIATE_EXIT.with(|cell| cell.set(flag));
        Ok(Self { _not_send: std::marker::PhantomData })
    }

    /// Lets kicks in, one that came meanwhile too: for the time of `KVM_RUN`.
    pub fn allow(&self) -> io::Result<()> {
        change_mask(libc::SIG_UNBLOCK)
    }

    /// Keeps kicks out: other KVM ioctls that meet a missing page of guest RAM would fail with
    /// EFAULT, or spin in the kernel, while a signal is pending.
    pub fn forbid(&self) -> io::Result<()> {
        change_mask(libc::SIG_BLOCK)
    }
}

fn change_mask(how: libc::c_int) -> io::Result<()> {
    // SAFETY: an all-zero sigset_t is valid storage for sigemptyset, which initialises it; the
    // calls read and write only this local set.
    let rc = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, SIGRTMIN() + KICK_OFFSET);
        libc::pthread_sigmask(how, &set, ptr::null_mut())
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(rc)) }
}

impl Drop for KickGuard {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.with(|cell| cell.set(ptr::null_mut()));
    }
}

/// The kernel's number of the calling thread.
pub fn this_thread() -> i32 {
    nix::unistd::gettid().as_raw()
}

/// Sends the kick signal to a thread of this process (`tgkill`). A thread that has ended is no error.
pub fn kick(thread: i32) {
    // SAFETY: tgkill takes plain numbers; a wrong one is ESRCH. The signal's handler is installed
    // before any thread number exists, and does nothing on a thread without a vCPU.
    unsafe {
        libc::syscall(libc::SYS_tgkill, std::process::id(), thread, SIGRTMIN() + KICK_OFFSET);
    }
}
