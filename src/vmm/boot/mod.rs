//! Loading a kernel: PVH ELF or bzImage, from a file or built in, with initrd, command line and ACPI tables.

mod acpi;
mod builtin;
mod bzimage;
mod elf;
pub mod layout;
mod source;

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::memory::GuestPhysAddr;
use crate::vmm::VmmError;
use crate::vmm::memory::GuestRam;
use source::Image;
pub use source::KernelSource;

/// What the boot loader of a machine is given.
pub struct BootConfig<'a> {
    /// The kernel.
    pub kernel: &'a KernelSource,
    /// An initial RAM disk, if any.
    pub initrd: Option<&'a PathBuf>,
    /// The command line.
    pub cmdline: &'a str,
    /// How many vCPUs the ACPI tables list.
    pub vcpus: u32,
    /// How many virtio devices they list: those in the first slots, at most
    /// [`crate::vmm::virtio::MAX_DEVICES`].
    pub virtio: usize,
}

/// How the first vCPU enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootEntry {
    /// The Xen x86/HVM direct boot ABI: 32-bit, EBX points at the start info.
    Pvh {
        /// Where the note says.
        entry: u64,
        /// `struct hvm_start_info`.
        start_info: GuestPhysAddr,
    },
    /// Linux's 64-bit boot protocol: RSI points at the zero page.
    Linux64 {
        /// The start of the protected-mode kernel plus 0x200.
        entry: u64,
        /// `struct boot_params`.
        zero_page: GuestPhysAddr,
    },
}

/// Why nothing could be booted.
#[derive(Debug, Error)]
#[allow(missing_docs)] // the messages say it
pub enum BootError {
    #[error("cannot read {what}: {source}")]
    Read { what: String, source: io::Error },
    #[error("{0} is neither an ELF with a PVH note nor a bzImage")]
    NeitherKind(String),
    #[error("{kernel} is an ELF without a PVH note (XEN_ELFNOTE_PHYS32_ENTRY), which is needed to boot it")]
    NoPvhNote { kernel: String },
    #[error("{kernel}: {reason}")]
    BadKernel { kernel: String, reason: String },
    #[error("memory of {} MiB is too small for {what}, which ends at {:#x} ({} MiB)", .memory >> 20, .end, .end.div_ceil(1 << 20))]
    TooSmall { what: String, memory: u64, end: u64 },
    #[error(
        "{what} of {bytes} bytes does not fit between the kernel's end at {kernel_end:#x} and the end of RAM below 4 GiB at {ram_end:#x}"
    )]
    InitrdDoesNotFit { what: String, bytes: u64, kernel_end: u64, ram_end: u64 },
    #[error("the command line has {bytes} bytes, at most {max} are possible")]
    CmdlineTooLong { bytes: usize, max: usize },
    #[error("the command line holds a NUL byte")]
    CmdlineNul,
    #[error("the ACPI tables of {vcpus} vCPUs have {bytes} bytes, at most {max} are possible")]
    AcpiTooLarge { vcpus: u32, bytes: usize, max: u64 },
    #[error("there is no built-in kernel {name:?}; there are: {known}")]
    UnknownBuiltin { name: String, known: String },
}

/// An initrd in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Loaded {
    start: u64,
    bytes: u64,
}

/// Loads kernel, initrd, command line and ACPI tables into fresh RAM, and says how to enter. Nothing larger than
/// the guest's RAM is read, whatever the files say about themselves.
pub fn load(ram: &GuestRam, config: &BootConfig<'_>) -> Result<BootEntry, VmmError> {
    let kernel = Image::of_kernel(config.kernel)?;
    check_cmdline(config.cmdline, layout::CMDLINE_MAX)?;
    acpi::write_tables(ram, config.vcpus, config.virtio)?;
    let mut head = [0u8; 0x300];
    let got = kernel.read_up_to(0, &mut head)?;
    let head = &head[..got];
    if elf::is_elf(head) {
        let plan = elf::plan(&kernel, ram.map())?;
        for segment in &plan.segments {
            kernel.copy_to(ram, segment.offset, segment.address, segment.file_bytes)?;
        }
        let initrd = load_initrd(ram, config, plan.end)?;
        write_cmdline(ram, config.cmdline)?;
        elf::write_start_info(ram, initrd, !config.cmdline.is_empty())?;
        Ok(BootEntry::Pvh { entry: plan.entry, start_info: layout::START_INFO })
    } else if bzimage::is_bzimage(head) {
        let plan = bzimage::plan(&kernel, head, ram.map())?;
        check_cmdline(config.cmdline, plan.cmdline_max)?;
        kernel.copy_to(ram, plan.offset, plan.address, plan.file_bytes)?;
        let initrd = load_initrd(ram, config, plan.end)?;
        write_cmdline(ram, config.cmdline)?;
        bzimage::write_zero_page(ram, head, &plan, initrd)?;
        Ok(BootEntry::Linux64 { entry: plan.address + 0x200, zero_page: layout::ZERO_PAGE })
    } else {
        Err(BootError::NeitherKind(kernel.name().into()).into())
    }
}

fn check_cmdline(cmdline: &str, max: usize) -> Result<(), BootError> {
    if cmdline.len() >= max {
        return Err(BootError::CmdlineTooLong { bytes: cmdline.len(), max: max - 1 });
    }
    match cmdline.contains('\0') {
        true => Err(BootError::CmdlineNul),
        false => Ok(()),
    }
}

fn write_cmdline(ram: &GuestRam, cmdline: &str) -> Result<(), VmmError> {
    ram.write(layout::CMDLINE, &[cmdline.as_bytes(), &[0]].concat())
}

/// Copies the initrd to the highest page-aligned place below the end of low RAM.
fn load_initrd(ram: &GuestRam, config: &BootConfig<'_>, kernel_end: u64) -> Result<Option<Loaded>, VmmError> {
    let Some(path) = config.initrd else { return Ok(None) };
    let image = Image::open("initrd", path)?;
    let bytes = image.bytes()?;
    if bytes == 0 {
        return Ok(None);
    }
    let ram_end = layout::low_ram_end(ram.map());
    let start = ram_end.saturating_sub(bytes) & !0xfff;
    if start < kernel_end {
        let what = image.name().to_string();
        return Err(BootError::InitrdDoesNotFit { what, bytes, kernel_end, ram_end }.into());
    }
    image.copy_to(ram, 0, start, bytes)?;
    Ok(Some(Loaded { start, bytes }))
}

/// The names of the built-in kernels.
pub const BUILTIN_NAMES: &[&str] = &["heartbeat"];

/// The built-in kernel of that name.
fn builtin_kernel(name: &str) -> Option<&'static [u8]> {
    (name == "heartbeat").then_some(builtin::HEARTBEAT_ELF)
}

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(in crate::vmm) use tests::{bzimage as test_bzimage, elf as test_elf};
