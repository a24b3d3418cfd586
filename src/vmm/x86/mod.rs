//! What is particular to x86: CPUID, MSRs, first registers, saving and restoring a vCPU.

pub mod clock;
pub mod cpuid;
pub mod features;
pub mod irqchip;
pub mod msrs;
pub mod paging;
pub mod registers;
pub mod restore;
pub mod save;
pub mod touched;
