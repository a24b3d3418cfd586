//! The virtual machine: KVM, vCPU threads, boot, devices, saving and restoring.
