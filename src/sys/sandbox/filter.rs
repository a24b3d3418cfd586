//! Which system calls the programs may make. docs/sandbox.md has the reasons, group by group.

use std::collections::BTreeMap;
use std::io;

use libc::*;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// Whose filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filter {
    /// `vmsend` and `vmrecv`.
    Mover,
    /// `vmrun`, all of its threads.
    Vmrun,
    /// A vCPU's thread in `vmrun`, on top of [`Filter::Vmrun`].
    Vcpu,
}

/// Memory of one's own. `mmap` and `mprotect` have conditions, see `conditions`.
const MEMORY: &[c_long] =
    &[SYS_brk, SYS_munmap, SYS_mremap, SYS_madvise, SYS_mincore, SYS_msync, SYS_memfd_create];
/// Threads that are there: waiting, waking, ending.
const THREADS: &[c_long] = &[
    SYS_futex,
    SYS_set_robust_list,
    SYS_get_robust_list,
    SYS_rseq,
    SYS_sched_yield,
    SYS_sched_getaffinity,
    SYS_sched_getattr,
    SYS_gettid,
    SYS_membarrier,
    SYS_exit,
    SYS_exit_group,
];
/// Handlers, masks, and signals to this process's own threads.
const SIGNALS: &[c_long] = &[
    SYS_rt_sigaction,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sigaltstack,
    SYS_restart_syscall,
    SYS_tgkill,
];
/// Clocks and sleeping, where the vDSO does not answer, and random numbers.
const TIME: &[c_long] = &[
    SYS_clock_gettime,
    SYS_clock_getres,
    SYS_gettimeofday,
    SYS_time,
    SYS_nanosleep,
    SYS_clock_nanosleep,
    SYS_getrandom,
];
/// Who and where this is.
const IDENTITY: &[c_long] = &[
    SYS_getpid,
    SYS_getppid,
    SYS_getuid,
    SYS_geteuid,
    SYS_getgid,
    SYS_getegid,
    SYS_getpgrp,
    SYS_getpgid,
    SYS_getcwd,
    SYS_uname,
    SYS_sysinfo,
    SYS_getrusage,
];
/// Descriptors that are open: reading, writing, waiting, closing.
const DESCRIPTORS: &[c_long] = &[
    SYS_read,
    SYS_write,
    SYS_readv,
    SYS_writev,
    SYS_pread64,
    SYS_pwrite64,
    SYS_preadv,
    SYS_pwritev,
    SYS_preadv2,
    SYS_pwritev2,
    SYS_lseek,
    SYS_close,
    SYS_dup,
    SYS_dup2,
    SYS_dup3,
    SYS_fcntl,
    SYS_fstat,
    SYS_newfstatat,
    SYS_statx,
    SYS_poll,
    SYS_ppoll,
    SYS_epoll_create1,
    SYS_epoll_ctl,
    SYS_epoll_wait,
    SYS_epoll_pwait,
    SYS_eventfd2,
    SYS_timerfd_create,
    SYS_timerfd_settime,
    SYS_timerfd_gettime,
    SYS_pipe2,
    SYS_fallocate,
    SYS_fsync,
    SYS_fdatasync,
    SYS_fadvise64,
];
/// Files by their names. Which ones is for landlock to say.
const FILES: &[c_long] = &[
    SYS_open,
    SYS_openat,
    SYS_access,
    SYS_faccessat2,
    SYS_stat,
    SYS_lstat,
    SYS_readlink,
    SYS_readlinkat,
    SYS_getdents64,
    SYS_statfs,
    SYS_fstatfs,
    SYS_flock,
];
/// Making, replacing and removing them: control sockets, session records, serial output.
const CHANGES: &[c_long] = &[
    SYS_unlink,
    SYS_unlinkat,
    SYS_rename,
    SYS_renameat,
    SYS_renameat2,
    SYS_link,
    SYS_linkat,
    SYS_chmod,
    SYS_fchmod,
    SYS_fchmodat,
    SYS_umask,
];
/// Sockets that are there. `socket` has conditions.
const CONNECTIONS: &[c_long] = &[
    SYS_connect,
    SYS_accept4,
    SYS_shutdown,
    SYS_sendto,
    SYS_recvfrom,
    SYS_sendmsg,
    SYS_recvmsg,
    SYS_sendmmsg,
    SYS_recvmmsg,
    SYS_getsockname,
    SYS_getpeername,
    SYS_getsockopt,
    SYS_setsockopt,
];
/// New sockets that wait for others.
const LISTENING: &[c_long] = &[SYS_bind, SYS_listen, SYS_socketpair];
/// A command that the spawner has started is ended by its pidfd.
const COMMANDS: &[c_long] = &[SYS_pidfd_send_signal];
/// What `vmrun` needs for its guest's RAM and faults, and to confine its threads further.
const VMRUN: &[c_long] = &[
    // Not for movers: RAM on a tmpfs is not sealed, and vmrun dies by SIGBUS where it was cut short.
    SYS_ftruncate,
    SYS_userfaultfd,
    // RAM on a tmpfs of its own; it takes CAP_SYS_ADMIN as well, which goes before the guest runs.
    SYS_fsopen,
    SYS_fsconfig,
    SYS_fsmount,
    SYS_capget,
    SYS_capset,
    SYS_seccomp,
    SYS_landlock_create_ruleset,
    SYS_landlock_add_rule,
    SYS_landlock_restrict_self,
    // Where the page size or the NUMA node of RAM is asked for.
    SYS_mbind,
    SYS_get_mempolicy,
];

/// A number that says itself which ioctl it is: bits 8 to 15 are the device's letter.
const IOCTL_LETTER: u64 = 0xff00;
const KVM: u64 = 0xae00;
const USERFAULTFD: u64 = 0xaa00;
/// Non-blocking sockets, and terminals: whether it is one, how wide, raw mode, pseudo-terminals.
const COMMON_IOCTLS: &[u64] = &[FIONBIO, FIOCLEX, FIONREAD, TCGETS, TIOCGWINSZ];
const TERMINAL_IOCTLS: &[u64] = &[TCSETS, TCSETSW, TCSETSF, TIOCGPGRP, TIOCGPTN, TIOCSPTLCK, TIOCGPTPEER];
/// TUN and TAP (`linux/if_tun.h`), block devices (`linux/fs.h`), network interfaces: of virtio devices.
const DEVICE_IOCTLS: &[u64] = &[
    0x4004_54ca, // TUNSETIFF
    0x4004_54d0, // TUNSETOFFLOAD
    0x4004_54d8, // TUNSETVNETHDRSZ
    0x4004_54dc, // TUNSETVNETLE
    0x8004_54cf, // TUNGETFEATURES
    0x8004_54d2, // TUNGETIFF
    0x8004_54d7, // TUNGETVNETHDRSZ
    0x8008_1272, // BLKGETSIZE64
    0x1268,      // BLKSSZGET
    0x127b,      // BLKPBSZGET
    0x1277,      // BLKDISCARD
    0x127f,      // BLKZEROOUT
    0x8913,      // SIOCGIFFLAGS
    0x8914,      // SIOCSIFFLAGS
    0x8921,      // SIOCGIFMTU
    0x8927,      // SIOCGIFHWADDR
    0x8933,      // SIOCGIFINDEX
];
/// As libc's constants, whose type differs between C libraries.
const FIONBIO: u64 = 0x5421;
const FIOCLEX: u64 = 0x5451;
const FIONREAD: u64 = 0x541b;
const TCGETS: u64 = 0x5401;
const TCSETS: u64 = 0x5402;
const TCSETSW: u64 = 0x5403;
const TCSETSF: u64 = 0x5404;
const TIOCGWINSZ: u64 = 0x5413;
const TIOCGPGRP: u64 = 0x540f;
const TIOCGPTN: u64 = 0x8004_5430;
const TIOCSPTLCK: u64 = 0x4004_5431;
const TIOCGPTPEER: u64 = 0x5441;

/// PR_SET_VMA of linux/prctl.h: newer C libraries name their memory with it.
const PR_SET_VMA: c_int = 0x5356_4d41;

impl Filter {
    /// As programs for the kernel, all of which count: the strictest wins.
    pub(super) fn compile(self) -> io::Result<Vec<BpfProgram>> {
        let mut calls = BTreeMap::new();
        for number in self.groups().iter().flat_map(|group| group.iter()) {
            calls.insert(*number, vec![]);
        }
        self.conditions(&mut calls).map_err(io::Error::other)?;
        let main = build(calls, SeccompAction::Trap, SeccompAction::Allow)?;
        if self == Self::Vcpu {
            return Ok(vec![main]);
        }
        // Its flags are in memory, where no filter can see them: told that it does not exist, the C
        // library takes clone, whose flags can be checked.
        let clone3 = BTreeMap::from([(SYS_clone3, vec![])]);
        let clone3 = build(clone3, SeccompAction::Allow, SeccompAction::Errno(ENOSYS as u32))?;
        Ok(vec![clone3, main])
    }

    fn groups(self) -> Vec<&'static [c_long]> {
        let mut groups = vec![MEMORY, THREADS, SIGNALS, TIME, IDENTITY, DESCRIPTORS];
        match self {
            Self::Mover => groups.extend([FILES, CHANGES, CONNECTIONS, LISTENING, COMMANDS]),
            Self::Vmrun => groups.extend([FILES, CHANGES, CONNECTIONS, LISTENING, VMRUN]),
            Self::Vcpu => groups.push(CONNECTIONS),
        }
        groups
    }

    fn conditions(
        self,
        calls: &mut BTreeMap<c_long, Vec<SeccompRule>>,
    ) -> Result<(), seccompiler::BackendError> {
        let (write, exec) = (PROT_WRITE as u64, PROT_EXEC as u64);
        // Never writable and executable; what was written never becomes executable.
        calls.insert(SYS_mmap, vec![masked(2, write, 0)?, masked(2, exec, 0)?]);
        calls.insert(SYS_mprotect, vec![masked(2, exec, 0)?]);
        calls.insert(SYS_prctl, either(0, &[PR_SET_NAME as u64, PR_GET_NAME as u64, PR_SET_VMA as u64])?);
        // Reading one's limits, not setting them.
        calls.insert(SYS_prlimit64, vec![no_new_limits()?]);
        let mut ioctls = either(1, COMMON_IOCTLS)?;
        if self != Self::Vcpu {
            // Threads, never processes.
            calls.insert(SYS_clone, vec![masked(0, CLONE_THREAD as u64, CLONE_THREAD as u64)?]);
            calls.insert(SYS_clone3, vec![]);
        }
        match self {
            Self::Mover => {
                // Being nicer, or prompt for the same share; more takes a capability, which is gone by now.
                calls.insert(SYS_sched_setattr, vec![equal(0, 0)?]);
                ioctls.push(masked(1, IOCTL_LETTER, USERFAULTFD)?);
                // To ask for the holes of huge pages. UFFD_USER_MODE_ONLY: it never holds up the kernel.
                calls.insert(SYS_userfaultfd, vec![masked(0, 1, 1)?]);
                // Netlink is how the C library asks which addresses there are when it resolves names.
                let families = [AF_UNIX, AF_INET, AF_INET6, AF_NETLINK];
                calls.insert(SYS_socket, either(0, &families.map(|f| f as u64))?);
            }
            Self::Vmrun => {
                ioctls.push(masked(1, IOCTL_LETTER, USERFAULTFD)?);
                ioctls.push(masked(1, IOCTL_LETTER, KVM)?);
                ioctls.extend(either(1, TERMINAL_IOCTLS)?);
                ioctls.extend(either(1, DEVICE_IOCTLS)?);
                calls.insert(SYS_socket, vec![equal(0, AF_UNIX as u64)?, inet_datagram()?]);
                calls.entry(SYS_prctl).or_default().extend(either(0, &[PR_SET_NO_NEW_PRIVS as u64])?);
            }
            Self::Vcpu => {
                ioctls.push(masked(1, IOCTL_LETTER, KVM)?);
                ioctls.extend(either(1, DEVICE_IOCTLS)?);
                calls.insert(SYS_socket, vec![equal(0, AF_UNIX as u64)?]);
                // For the backtrace of a panic: reading, and what landlock leaves of that.
                let writing = (O_WRONLY | O_RDWR | O_CREAT) as u64;
                calls.insert(SYS_openat, vec![masked(2, writing, 0)?]);
                calls.insert(SYS_readlink, vec![]);
            }
        }
        calls.insert(SYS_ioctl, ioctls);
        Ok(())
    }
}

/// prlimit64 whose pointer to new limits is null.
fn no_new_limits() -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?])
}

/// An IPv4 datagram socket, on which network interfaces are asked for by ioctl. It opens no
/// connection: the TAP device needs it.
fn inet_datagram() -> Result<SeccompRule, seccompiler::BackendError> {
    // SOCK_CLOEXEC and SOCK_NONBLOCK may come with the type.
    let kind = SeccompCmpOp::MaskedEq(0xf);
    SeccompRule::new(vec![
        SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, AF_INET as u64)?,
        SeccompCondition::new(1, SeccompCmpArgLen::Dword, kind, SOCK_DGRAM as u64)?,
    ])
}

fn build(
    calls: BTreeMap<c_long, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> io::Result<BpfProgram> {
    let arch = std::env::consts::ARCH.try_into().map_err(io::Error::other)?;
    let filter = SeccompFilter::new(calls, otherwise, matched, arch).map_err(io::Error::other)?;
    filter.try_into().map_err(io::Error::other)
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    condition(argument, SeccompCmpOp::MaskedEq(mask), value)
}

fn equal(argument: u8, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    condition(argument, SeccompCmpOp::Eq, value)
}

fn either(argument: u8, values: &[u64]) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    values.iter().map(|value| equal(argument, *value)).collect()
}

fn condition(argument: u8, op: SeccompCmpOp, value: u64) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value)?])
}
