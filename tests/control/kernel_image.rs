//! Which pages are the guest's kernel.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use vmferry::control::{FailureCode, RunState};

use crate::host::{Vmrun, kvm, session};

const PAGES: u64 = (64 << 20) / 4096;

/// The pages in the shared bitmap, as one run each.
fn runs(bitmap: &File) -> Vec<Range<u64>> {
    let mut bytes = vec![0; PAGES as usize / 8];
    bitmap.read_exact_at(&mut bytes, 0).unwrap();
    let is_in = |page: u64| bytes[page as usize / 8] & 1 << (page % 8) != 0;
    let mut runs: Vec<Range<u64>> = Vec::new();
    for page in (0..PAGES).filter(|page| is_in(*page)) {
        match runs.last_mut().filter(|run| run.end == page) {
            Some(run) => run.end += 1,
            None => runs.push(page..page + 1),
        }
    }
    runs
}

#[test]
fn a_kernel_is_found_while_it_runs_and_while_it_is_paused() {
    if !kvm() {
        return;
    }
    let vmrun = Vmrun::start(&["--kernel", env!("OTHER_ELF"), "--memory", "64M", "--serial", "file:log"]);
    let log = || fs::read_to_string(vmrun.path("log")).unwrap_or_default();
    vmrun.until("the guest is up", || log().contains("tick 1\n"));
    let mut mover = vmrun.client();
    assert_eq!(mover.kernel_image().unwrap_err().code(), Some(FailureCode::Refused), "not attached");
    mover.attach(Some(session(1)), "a").unwrap();
    assert_eq!(mover.kernel_image().unwrap_err().code(), Some(FailureCode::Refused), "no bitmap yet");
    let (_, bitmap) = mover.dirty_start().unwrap();
    let bitmap = File::from(bitmap);
    // What tests/guests/other.S says.
    let kernel = [0x400..0x600, 0x1000..0x1800];
    assert_eq!(mover.kernel_image().unwrap().pages, 2560);
    assert_eq!(runs(&bitmap), kernel);
    assert_eq!(vmrun.status().run_state, RunState::Running);
    let before = log().len();
    vmrun.until("the guest goes on", || log().len() > before);
    mover.pause(true).unwrap();
    assert_eq!((mover.kernel_image().unwrap().pages, runs(&bitmap)), (2560, kernel.to_vec()));
    // The bitmap serves the dirty log as before: all pages, since none was cleared.
    assert_eq!(mover.dirty_take().unwrap().pages, PAGES);
    assert_eq!(runs(&bitmap).as_slice(), std::slice::from_ref(&(0..PAGES)));
}

#[test]
fn of_a_guest_that_has_nothing_there_nothing_is_found_on_any_vcpu() {
    if !kvm() {
        return;
    }
    let kernel =
        ["--kernel", "builtin:heartbeat", "--cmdline", "vcpus=2", "--memory", "16M", "--serial", "file:log"];
    // Of four vCPUs two wait to be started, for ever.
    let vmrun = Vmrun::start(&[&kernel[..], &["--cpus", "4"]].concat());
    vmrun.beats();
    let mut mover = vmrun.client();
    mover.attach(Some(session(1)), "a").unwrap();
    mover.dirty_start().unwrap();
    assert_eq!(mover.kernel_image().unwrap().pages, 0);
    vmrun.beats();
}
