//! What happens when a system call is refused: it is named on standard error, and then the program
//! ends, or goes on without it.
//!
//! The filter answers with SIGSYS (SECCOMP_RET_TRAP, seccomp(2)); everything here runs in its handler,
//! so it allocates nothing, takes no lock and calls only what every filter allows.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::names;

/// What a refused system call leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The process ends with this exit code: for movers, whose guest is with its `vmrun`.
    Exit(i32),
    /// The call fails with ENOSYS, as on a kernel that lacks it, and the process goes on: for
    /// `vmrun`, with which its guest would end. Each call is named once.
    Fail,
}

static PROGRAM: OnceLock<(&str, Refusal)> = OnceLock::new();

/// The calls that were named, a bit each; those beyond share the last.
static NAMED: [AtomicU64; 8] = [const { AtomicU64::new(0) }; 8];

/// `si_code` of a SIGSYS that a filter has raised (`SYS_SECCOMP` in siginfo.h).
const SYS_SECCOMP: libc::c_int = 1;

/// The head of `siginfo_t` with the fields of SIGSYS (sigaction(2)), which libc does not name.
#[repr(C)]
struct SigsysInfo {
    signal: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    address: *mut libc::c_void,
    number: libc::c_int,
    arch: libc::c_uint,
}

const _: () = assert!(std::mem::offset_of!(SigsysInfo, number) == 24);
const _: () = assert!(size_of::<SigsysInfo>() <= size_of::<libc::siginfo_t>());

/// Installs the handler, for `program` and all its threads. The first word counts.
pub(super) fn install(program: &'static str, refusal: Refusal) -> io::Result<()> {
    PROGRAM.get_or_init(|| (program, refusal));
    // SAFETY: all zero is a valid sigaction, whose mask is empty.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_refused as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for, and does only what a signal
    // handler may; the old action is not wanted.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn on_refused(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a siginfo_t, at least as large as this head of it, which lives as
    // long as the handler runs.
    let info = unsafe { &*info.cast::<SigsysInfo>() };
    let Some((program, refusal)) = PROGRAM.get().filter(|_| info.code == SYS_SECCOMP) else { return };
    let number = i64::from(info.number);
    let first = {
        let at = usize::try_from(number).map_or(511, |n| n.min(511));
        let bit = 1 << (at % 64);
        NAMED[at / 64].fetch_or(bit, Ordering::Relaxed) & bit == 0
    };
    if first || matches!(refusal, Refusal::Exit(_)) {
        tell(program, *refusal, number);
    }
    match refusal {
        // SAFETY: `_exit` runs no destructor and flushes nothing.
        Refusal::Exit(code) => unsafe { libc::_exit(*code) },
        Refusal::Fail => {
            // SAFETY: for a handler with SA_SIGINFO the third argument is the interrupted thread's
            // ucontext_t, which is this handler's to change; RAX is where the result of the system
            // call is looked for.
            let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
            context.uc_mcontext.gregs[libc::REG_RAX as usize] = -i64::from(libc::ENOSYS);
        }
    }
}

/// One line on standard error, in one write.
fn tell(program: &str, refusal: Refusal, number: i64) {
    let mut line = Line { bytes: [0; 512], used: 0 };
    let mut thread = [0u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes, with a zero at the end, to where it is told.
    unsafe { libc::prctl(libc::PR_GET_NAME, thread.as_mut_ptr()) };
    let thread = thread.split(|b| *b == 0).next().unwrap_or_default();
    line.add(program.as_bytes());
    line.add(b": the sandbox has refused the system call ");
    line.add(names::name(number).as_bytes());
    line.add(b" (number ");
    line.add_number(number.unsigned_abs());
    line.add(b") to thread ");
    line.add(thread);
    match refusal {
        Refusal::Exit(code) => {
            line.add(b": it ends here with exit code ");
            line.add_number(code.unsigned_abs().into());
            line.add(b", the guest is with its vmrun, and vmctl SOCK status says in which state.");
        }
        Refusal::Fail => line.add(b": the call fails with ENOSYS, and the guest goes on."),
    }
    line.add(b" Unless somebody has attacked it, this is a bug to be reported; --no-sandbox does without.\n");
    // SAFETY: a write of initialised bytes; that nobody may read them is no matter.
    unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.used) };
}

/// Text in a fixed buffer; what does not fit is left out.
struct Line {
    bytes: [u8; 512],
    used: usize,
}

impl Line {
    fn add(&mut self, text: &[u8]) {
        let room = &mut self.bytes[self.used..];
        let n = text.len().min(room.len());
        room[..n].copy_from_slice(&text[..n]);
        self.used += n;
    }

    fn add_number(&mut self, number: u64) {
        let mut digits = [0; 20];
        let (mut left, mut at) = (number, digits.len());
        loop {
            at -= 1;
            digits[at] = b'0' + (left % 10) as u8;
            left /= 10;
            if left == 0 {
                return self.add(&digits[at..]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_written_without_allocating() {
        let mut line = Line { bytes: [0; 512], used: 0 };
        [0, 7, 10, 59, u64::MAX].into_iter().for_each(|n| {
            line.add_number(n);
            line.add(b" ");
        });
        assert_eq!(&line.bytes[..line.used], b"0 7 10 59 18446744073709551615 ");
        line.add(&[b'x'; 1000]);
        assert_eq!(line.used, 512);
    }
}
