//! One microVM: made, driven, saved, restored, ended.

mod opening;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::boot::{self, BootConfig, KernelSource};
use super::config::{LocalConfig, MachineConfig};
use super::devices::{Bus, SerialBackend, SerialPort};
use super::dirty::DirtyLog;
use super::fault::FaultPoint;
use super::host::{self, HostAbilities};
use super::memory::{self, GuestRam};
use super::saved::{self, VmParts};
use super::vcpu::{Job, Round, SavedVcpu, VcpuGroup};
use super::virtio::{Kind, VirtioSlots};
use super::x86::save::VcpuLayout;
use super::x86::{clock, cpuid, irqchip, registers};
use super::{Exported, Notice, NoticeSender, PrepareError, SyncTimes, VmmError, first_pages, preflight};
use crate::memory::{PageRun, PageSet, RamPages};
use crate::state::{MachineDescription, Problem};
use opening::{Opened, SERIAL_ID, arriving_devices, describe, open_devices};

/// IA32_MTRR_DEF_TYPE: MTRRs on, memory is write-back. Firmware would set it; kernels look at it.
const MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 1 << 11 | 6);

/// How long vCPUs may take to leave guest mode for a moment. One that waits for a page of its host's may take longer.
const IMAGE_WAIT: Duration = Duration::from_secs(1);

/// A microVM on this host. Its vCPUs are threads of this process; no call waits for them, but for
/// [`Machine::kernel_image`] and [`Machine::stop`].
pub struct Machine {
    // Dropped in this order: the threads, then what they use.
    vcpus: VcpuGroup,
    parts: Arc<Parts>,
    dirty: Mutex<DirtyLog>,
    description: MachineDescription,
    notices: NoticeSender,
    fault: FaultPoint,
}

/// Whether a machine holds a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// Prepared, nothing loaded; or an import failed.
    Empty,
    /// An import is under way.
    Importing,
    /// Booted or imported.
    Guest,
}

/// What threads of a machine share.
struct Parts {
    content: Mutex<Content>,
    vm: Arc<VmFd>,
    bus: Arc<Bus>,
    ram: GuestRam,
    layout: Arc<VcpuLayout>,
}

impl Machine {
    /// Makes a machine and loads its kernel. All vCPUs are parked.
    pub fn boot(config: &MachineConfig, notices: NoticeSender) -> Result<Self, VmmError> {
        let kvm = host::open_kvm()?;
        let host = HostAbilities::of_this_host(&kvm)?;
        if config.vcpus == 0 || config.vcpus > host.max_vcpus {
            return Err(VmmError::VcpuCount { vcpus: config.vcpus, max: host.max_vcpus });
        }
        let map = memory::ram_map(config.memory_bytes)?;
        let available = host.memory_available_bytes;
        if config.ram_pages == RamPages::Huge {
            host.huge_pages.problem(config.memory_bytes).map_or(Ok(()), |p| Err(VmmError::HugePages(p)))?;
        } else if config.memory_bytes > available {
            return Err(VmmError::TooMuchRam { wanted: config.memory_bytes, available });
        }
        let ram = GuestRam::new(map, &config.name, config.ram_pages)?;
        ram.join_pages(true);
        let devices = open_devices(config)?;
        let description = describe(config, &ram, &host, &devices);
        let mut cmdline = config.cmdline.clone();
        if matches!(config.kernel, KernelSource::Builtin(_)) {
            // The built-in guests cannot count CPUs or measure time by themselves.
            cmdline += &format!(" vcpus={} tsc_khz={}", config.vcpus, host.tsc_khz);
        }
        let kernel = BootConfig {
            kernel: &config.kernel,
            initrd: config.initrd.as_ref(),
            cmdline: cmdline.trim_start(),
            vcpus: config.vcpus,
            virtio: devices.len(),
        };
        let entry = boot::load(&ram, &kernel)?;
        let (vm, fds) = create(&kvm, &ram, config.vcpus)?;
        for (number, fd) in (0..).zip(&fds) {
            host::set_cpuid(fd, &cpuid::for_vcpu(&host.cpuid, number, config.vcpus))?;
            set_mtrr_default(fd);
        }
        registers::enter(&fds[0], &ram, &entry)?;
        let machine = Self::assemble(
            vm,
            fds,
            ram,
            description,
            &config.serial,
            devices,
            notices,
            FaultPoint::default(),
        )?;
        machine.parts.set_content(Content::Guest);
        Ok(machine)
    }

    /// Makes a machine as `desc` describes it, with fresh RAM and nothing loaded, for
    /// [`Machine::request_import`]; or says everything that keeps this host from it.
    pub fn prepare(
        desc: &MachineDescription,
        local: LocalConfig,
        notices: NoticeSender,
    ) -> Result<Self, PrepareError> {
        let kvm = host::open_kvm()?;
        let host = HostAbilities::of_this_host(&kvm)?;
        let mut description = desc.clone();
        description.ram_pages = local.ram_pages.unwrap_or(desc.ram_pages);
        let mut problems = preflight::problems(&description, &host);
        problems.extend(preflight::unknown_remaps(desc, local.remaps.keys()));
        if local.postcopy {
            problems.extend(preflight::userfaultfd_problem(description.ram_pages));
        }
        let serial = match local.remaps.get(SERIAL_ID).map(|text| text.parse()) {
            None => local.serial.clone(),
            Some(Ok(backend)) => backend,
            Some(Err(e)) => {
                problems.push(Problem { topic: "device".into(), text: format!("--remap {SERIAL_ID}: {e}") });
                SerialBackend::None
            }
        };
        let devices = arriving_devices(&mut description, &local, &mut problems);
        if !problems.is_empty() {
            return Err(PrepareError::Refused(problems));
        }
        let fault = FaultPoint::of(&local);
        let ram = GuestRam::new(desc.ram.clone(), &desc.name, description.ram_pages)?;
        ram.join_pages(!local.postcopy);
        let (vm, fds) = create(&kvm, &ram, desc.vcpus)?;
        for device in description.devices.iter_mut().filter(|d| d.id == SERIAL_ID) {
            device.host = Some(serial.to_string());
        }
        Ok(Self::assemble(vm, fds, ram, description, &serial, devices, notices, fault)?)
    }

    #[allow(clippy::too_many_arguments)] // the parts of a machine
    fn assemble(
        vm: VmFd,
        fds: Vec<VcpuFd>,
        ram: GuestRam,
        description: MachineDescription,
        serial: &SerialBackend,
        devices: Opened,
        notices: NoticeSender,
        fault: FaultPoint,
    ) -> Result<Self, VmmError> {
        let vm = Arc::new(vm);
        let dirty = DirtyLog::new(&vm, ram.map().total_pages())?;
        let bus = Arc::new(Bus {
            serial: SerialPort::new(Arc::clone(&vm), serial)?,
            virtio: VirtioSlots::new(&vm, &ram, devices)?,
        });
        let relies_on = |name: &str| description.capabilities.iter().any(|c| c == name);
        let layout = Arc::new(VcpuLayout {
            msrs: description.msrs.clone(),
            xsave_bytes: description.xsave_bytes,
            sregs2: relies_on(host::CAP_SREGS2),
            tsc_offset: relies_on(host::CAP_TSC_OFFSET),
        });
        let content = Mutex::new(Content::Empty);
        let parts = Arc::new(Parts { content, vm, bus: Arc::clone(&bus), ram, layout });
        let vcpus = VcpuGroup::start(fds, bus, notices.clone(), Arc::clone(&parts))?;
        Ok(Self { vcpus, parts, dirty: Mutex::new(dirty), description, notices, fault })
    }

    /// What another host must know of the machine.
    pub fn describe(&self) -> &MachineDescription {
        &self.description
    }

    /// The machine's RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.parts.ram
    }

    /// The pseudo-terminal that was made for the serial port, to be told to the user.
    pub fn serial_path(&self) -> Option<&Path> {
        self.parts.bus.serial.path()
    }

    /// Lets the vCPUs enter guest mode; from here on the devices act on the host. To be called only
    /// by the owner of the guest.
    pub fn run(&self) -> Result<(), VmmError> {
        self.parts.want_guest()?;
        self.vcpus.run()?;
        self.parts.bus.virtio.resume();
        self.parts.bus.serial.connect()
    }

    /// Whether all vCPUs are parked and all devices at rest.
    pub fn is_paused(&self) -> bool {
        self.vcpus.is_parked() && self.parts.bus.virtio.are_still()
    }

    /// Asks the vCPUs to park, each with its last instruction completed. [`Notice::Paused`] follows
    /// when all have; at once if they are parked.
    ///
    /// A vCPU that sits in a page fault parks when its page has come. From the kick until then its
    /// thread may spin in the kernel (the fault is retried while a signal is pending), so this is
    /// better not asked for while a link that owes pages is down.
    pub fn request_pause(&self) {
        self.parts.bus.serial.disconnect();
        self.vcpus.request_pause();
    }

    /// Saves a paused machine: [`Notice::Exported`] follows. The vCPUs are read on their threads, at
    /// the same time. Saving may write guest RAM: the last dirty set is taken after it.
    pub fn request_export(&self) {
        if let Err(e) = self.parts.want_guest().and_then(|()| self.want_paused()) {
            return self.notices.send(Notice::Exported(Err(e)));
        }
        let (parts, notices) = (Arc::clone(&self.parts), self.notices.clone());
        let round = Arc::new(Round::new(self.description.vcpus as usize, move |vcpus| {
            notices.send(Notice::Exported(vcpus.and_then(|sections| export(&parts, sections))));
        }));
        self.vcpus.assign(|_| Job::Save(Arc::clone(&self.parts.layout), Arc::clone(&round)));
    }

    /// Restores a prepared machine from a saved state: [`Notice::Synchronised`] follows. First all of
    /// the state is checked, then the devices and the clock are restored, then every vCPU on its own
    /// thread. Nothing of this is on the caller's thread, and it may take as long as a page of guest
    /// RAM is missing.
    pub fn request_import(&self, state: Vec<u8>) {
        if let Err(e) = self.want_paused().and_then(|()| self.parts.begin_import()) {
            return self.notices.send(Notice::Synchronised(Err(e)));
        }
        let (parts, notices) = (Arc::clone(&self.parts), self.notices.clone());
        let (fault, vcpus) = (self.fault.clone(), self.description.vcpus);
        let khz = self.description.tsc.khz;
        let assign = self.vcpus.assigner();
        let done = move |result: Result<SyncTimes, VmmError>| {
            parts.set_content(if result.is_ok() { Content::Guest } else { Content::Empty });
            notices.send(Notice::Synchronised(result));
        };
        let source = Arc::clone(&self.parts);
        let importer = move || {
            let began = Instant::now();
            let (images, tsc) = match import(&source, &state, vcpus, khz, &fault) {
                Ok(found) => found,
                Err(e) => return done(Err(e)),
            };
            let import_us = began.elapsed().as_micros() as u64;
            let began = Instant::now();
            let round = Arc::new(Round::new(images.len(), move |all: Result<Vec<()>, _>| {
                let sync_us = began.elapsed().as_micros() as u64;
                done(all.map(|_| SyncTimes { import_us, sync_us }));
            }));
            let trap = Arc::new(fault.trap.clone());
            let load = |image| Job::Load(Box::new(image), tsc, Arc::clone(&trap), Arc::clone(&round));
            assign(images.into_iter().map(load).collect());
        };
        if let Err(e) = thread::Builder::new().name("import".into()).spawn(importer) {
            self.parts.set_content(Content::Empty);
            self.notices.send(Notice::Synchronised(Err(VmmError::Thread(e))));
        }
    }

    /// The pages of the guest's kernel, as far as they are found: its code, and its data with a name. The vCPUs leave
    /// guest mode for a moment, each by itself; this waits for them, and so is nothing for the thread that answers.
    pub fn kernel_image(&self) -> Result<PageSet, VmmError> {
        self.parts.want_guest()?;
        let (bring, all) = mpsc::channel();
        let round = Arc::new(Round::new(self.description.vcpus as usize, move |all| {
            let _ = bring.send(all);
        }));
        self.vcpus.interrupt(|| Job::Translation(Arc::clone(&round)));
        let translations = all.recv_timeout(IMAGE_WAIT).map_err(|_| VmmError::VcpusBusy)??;
        let translations: Vec<_> = translations.into_iter().flatten().collect();
        Ok(first_pages::kernel_image(&self.parts.ram, &translations))
    }

    /// Turns the dirty log on: every write from now on is noted. The first pass then sends all pages
    /// (see [`Machine::dirty_clear`]).
    ///
    /// Not to be called while pages of the machine may be missing: changing a memslot waits for
    /// every vCPU that sits in a page fault (KVM's SRCU), for ever if the page never comes. The same
    /// holds for [`Machine::dirty_stop`] of a log that is on.
    pub fn dirty_start(&self) -> Result<(), VmmError> {
        self.parts.want_guest()?;
        self.dirty().start(&self.parts.vm, &self.parts.ram)
    }

    /// Fills `into` with the pages that were written since they were last cleared (one bit a page,
    /// dense over the RAM map), and gives their number.
    pub fn dirty_take(&self, into: &mut [u64]) -> Result<u64, VmmError> {
        self.dirty().take(&self.parts.vm, &self.parts.ram, into)
    }

    /// To be called before pages of `run` are read to be sent: notes writes to those of them that
    /// the last take gave (after the start: to all) anew. `run` may be any stretch of RAM.
    pub fn dirty_clear(&self, run: PageRun) -> Result<(), VmmError> {
        self.dirty().clear(&self.parts.vm, &self.parts.ram, run)
    }

    /// Gives pages back that were taken and did not get across: the next take has them.
    pub fn dirty_put_back(&self, pages: &PageSet) {
        self.dirty().put_back(pages);
    }

    /// Turns the dirty log off.
    pub fn dirty_stop(&self) -> Result<(), VmmError> {
        self.dirty().stop(&self.parts.vm, &self.parts.ram)
    }

    /// The guest runs elsewhere for good, and this machine stays with its remains: what programs of the
    /// host have of its devices ends.
    pub fn let_go(&self) {
        self.parts.bus.virtio.let_go();
    }

    /// Ends all threads and closes everything. Waits for them for a second at most.
    pub fn stop(&self) {
        self.vcpus.stop();
        self.parts.bus.virtio.stop();
        self.parts.bus.serial.close();
    }

    fn want_paused(&self) -> Result<(), VmmError> {
        match self.is_paused() {
            true => Ok(()),
            false => Err(VmmError::WrongState("running")),
        }
    }

    fn dirty(&self) -> MutexGuard<'_, DirtyLog> {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Parts {
    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_content(&self, content: Content) {
        *self.content() = content;
    }

    fn want_guest(&self) -> Result<(), VmmError> {
        match *self.content() {
            Content::Guest => Ok(()),
            Content::Importing => Err(VmmError::WrongState("being imported")),
            Content::Empty => Err(VmmError::WrongState("empty")),
        }
    }

    /// Only an empty machine is imported into; an import that failed leaves it empty.
    fn begin_import(&self) -> Result<(), VmmError> {
        let mut content = self.content();
        match *content {
            Content::Empty => {
                *content = Content::Importing;
                Ok(())
            }
            Content::Importing => Err(VmmError::WrongState("being imported")),
            Content::Guest => Err(VmmError::WrongState("not empty")),
        }
    }
}

/// Makes the VM with its RAM and its vCPUs.
fn create(kvm: &Kvm, ram: &GuestRam, vcpus: u32) -> Result<(VmFd, Vec<VcpuFd>), VmmError> {
    let vm = host::create_vm(kvm)?;
    ram.set_memslots(&vm, false)?;
    let fds = (0..u64::from(vcpus)).map(|number| vm.create_vcpu(number));
    let fds = fds.collect::<Result<_, _>>().map_err(VmmError::kvm("KVM_CREATE_VCPU"))?;
    Ok((vm, fds))
}

/// Kernels do without: a KVM that refuses is no error.
fn set_mtrr_default(vcpu: &VcpuFd) {
    let (index, data) = MTRR_DEF_TYPE;
    if let Ok(msrs) = Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }]) {
        let _ = vcpu.set_msrs(&msrs);
    }
}

/// The rest of an export, on the thread of the vCPU that was read last.
fn export(parts: &Parts, vcpus: Vec<SavedVcpu>) -> Result<Exported, VmmError> {
    let (vcpus, roots): (Vec<_>, Vec<_>) = vcpus.into_iter().unzip();
    let first_touched = first_pages::first_touched(&parts.ram, &roots);
    let save = |(_, slot): (u32, &super::virtio::Slot)| Ok((slot.kind(), slot.save()?));
    let virtio = parts.bus.virtio.iter().map(save).collect::<Result<_, VmmError>>()?;
    let vm = VmParts {
        irqchip: irqchip::save(&parts.vm)?,
        pit: irqchip::save_pit(&parts.vm)?,
        clock: clock::save(&parts.vm)?,
        serial: parts.bus.serial.save(),
        virtio,
    };
    let state = saved::write(vcpus, &vm)?;
    // Written while all of that was saved, as a rule. Once the guest runs elsewhere, this process may
    // be killed at any time, and must have nothing left of it.
    parts.bus.serial.drain();
    Ok(Exported { state, first_touched })
}

type Import = (Vec<super::x86::restore::VcpuImage>, clock::TscRule);

/// Checks the saved state and restores all but the vCPUs.
fn import(parts: &Parts, state: &[u8], vcpus: u32, khz: u32, fault: &FaultPoint) -> Result<Import, VmmError> {
    let kinds: Vec<Kind> = parts.bus.virtio.iter().map(|(_, slot)| slot.kind()).collect();
    let state = saved::check(state, vcpus, &parts.layout, &kinds)?;
    fault.at("serial")?;
    parts.bus.serial.restore(&state.serial)?;
    fault.at("irqchip")?;
    irqchip::restore(&parts.vm, &state.chips)?;
    fault.at("pit")?;
    irqchip::restore_pit(&parts.vm, &state.pit)?;
    for ((_, slot), state) in parts.bus.virtio.iter().zip(state.virtio) {
        fault.at(slot.id())?;
        slot.restore(state)?;
    }
    fault.at("clock")?;
    let here = clock::restore(&parts.vm, &state.clock)?;
    Ok((state.vcpus, clock::tsc_rule(&state.clock, &here, khz)))
}

#[cfg(test)]
mod tests;
