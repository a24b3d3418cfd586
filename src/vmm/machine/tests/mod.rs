//! A real guest on a real KVM: booted, paused, saved, restored into a second machine.

mod devices;
mod dirty;
mod moving;
mod pausing;
mod virtio;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::*;
use crate::memory::{GuestPhysAddr, PAGE_BYTES, PageIndex};
use crate::state::{read_sections, write_sections};
use crate::vmm::boot::{test_bzimage, test_elf};
use crate::vmm::notice::NoticeReceiver;
use crate::vmm::{DeviceConfig, GuestExit, Notice};

/// How long a test waits for what should come at once.
const PATIENCE: Duration = Duration::from_secs(20);

/// Whether KVM is here. Without it tests are skipped, said aloud, unless `REQUIRE_KVM` is set.
fn kvm_is_here() -> bool {
    match host::open_kvm() {
        Ok(_) => true,
        Err(e) if std::env::var_os("REQUIRE_KVM").is_some_and(|v| v == "1") => panic!("{e}"),
        Err(e) => {
            eprintln!("skipped: {e}");
            false
        }
    }
}

/// A machine with its notices and its serial output.
struct Guest {
    machine: Machine,
    notices: NoticeReceiver,
    serial: PathBuf,
    _directory: tempfile::TempDir,
}

impl Guest {
    fn boot(vcpus: u32, mib: u64, cmdline: &str) -> Self {
        Self::boot_kernel(vcpus, mib, KernelSource::Builtin("heartbeat".into()), cmdline)
    }

    /// A guest of `code` in ring 0, 32-bit, at 1 MiB.
    fn boot_code(vcpus: u32, code: &[u8]) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), test_elf(code, 0x1000, true)).unwrap();
        Self::boot_kernel(vcpus, 16, KernelSource::File(file.path().into()), "")
    }

    fn boot_kernel(vcpus: u32, mib: u64, kernel: KernelSource, cmdline: &str) -> Self {
        Self::boot_with(vcpus, mib, kernel, cmdline, Vec::new())
    }

    fn boot_with(
        vcpus: u32,
        mib: u64,
        kernel: KernelSource,
        cmdline: &str,
        devices: Vec<DeviceConfig>,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let serial = directory.path().join("serial");
        let (sender, notices) = NoticeSender::channel().unwrap();
        let config = MachineConfig {
            name: "test".into(),
            uuid: "0".into(),
            ram_pages: Default::default(),
            memory_bytes: mib << 20,
            vcpus,
            kernel,
            initrd: None,
            cmdline: cmdline.into(),
            serial: SerialBackend::File(serial.clone()),
            devices,
        };
        let machine = Machine::boot(&config, sender).unwrap();
        Self { machine, notices, serial, _directory: directory }
    }

    /// An empty machine like `other`.
    fn prepare(other: &Guest, fault: Option<&str>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let serial = directory.path().join("serial");
        let (sender, notices) = NoticeSender::channel().unwrap();
        let mut local = LocalConfig { serial: SerialBackend::File(serial.clone()), ..Default::default() };
        set_fault(&mut local, fault);
        let machine = Machine::prepare(other.machine.describe(), local, sender).unwrap();
        Self { machine, notices, serial, _directory: directory }
    }

    fn notice(&self) -> Notice {
        self.notices.receiver.recv_timeout(PATIENCE).expect("a notice")
    }

    fn pause(&self) -> Duration {
        let began = Instant::now();
        self.machine.request_pause();
        match self.notice() {
            Notice::Paused => began.elapsed(),
            other => panic!("{other:?}"),
        }
    }

    fn export(&self) -> Vec<u8> {
        self.machine.request_export();
        match self.notice() {
            Notice::Exported(saved) => saved.unwrap().state,
            other => panic!("{other:?}"),
        }
    }

    fn import(&self, state: Vec<u8>) -> Result<SyncTimes, VmmError> {
        self.machine.request_import(state);
        match self.notice() {
            Notice::Synchronised(result) => result,
            other => panic!("{other:?}"),
        }
    }

    fn output(&self) -> String {
        output(&self.serial)
    }

    /// Waits until the output holds `text` after its first `from` bytes.
    fn wait_for(&self, from: usize, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.output().get(from..).unwrap_or_default().contains(text) {
            if let Ok(Notice::Exit(exit)) = self.notices.receiver.try_recv() {
                panic!("the guest ended: {exit:?}\n{}", self.output());
            }
            assert!(Instant::now() < deadline, "no {text:?} in:\n{}", self.output());
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn wait_for_beats(&self) {
        let from = self.output().len();
        for round in 0..3 {
            let from = self.output().len().max(from);
            self.wait_for(from, "\n");
            assert!(round < 3);
        }
        assert!(!self.output().contains("CORRUPT"), "{}", self.output());
    }

    fn copy_ram_to(&self, other: &Guest) {
        let mut page = vec![0; 1 << 20];
        for region in self.machine.ram().map().regions() {
            for at in (region.start.0..region.start.0 + region.bytes).step_by(page.len()) {
                self.machine.ram().read(GuestPhysAddr(at), &mut page).unwrap();
                other.machine.ram().write(GuestPhysAddr(at), &page).unwrap();
            }
        }
    }
}

fn output(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}

#[cfg(feature = "fault-points")]
fn set_fault(local: &mut LocalConfig, fault: Option<&str>) {
    local.fault = fault.map(Into::into);
}

#[cfg(not(feature = "fault-points"))]
fn set_fault(_: &mut LocalConfig, _: Option<&str>) {}
