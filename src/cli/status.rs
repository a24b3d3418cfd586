//! The status of a `vmrun` for people: of `vmctl SOCK status` and `vmsend --status --vm SOCK`.

use std::path::Path;

use super::output;
use super::units::Size;
use crate::control::{Client, ClientError, LinkState, MoverState, Status, seconds};
use crate::memory::RamPages;
use crate::vmm::service::SessionRecord;

/// Who has the guest, what it is, what its mover does, what is waited for.
pub fn text(status: &Status) -> String {
    let name = status.name.as_deref().map(|n| format!("{n}: ")).unwrap_or_default();
    let mut text = format!("{name}{}", status.summary);
    if status.vcpus > 0 {
        let (vcpus, memory) = (status.vcpus, Size(status.memory_bytes));
        text += &format!("\n  {vcpus} vCPU{}, {memory} memory", if vcpus == 1 { "" } else { "s" });
        if let Some(pages) = status.ram_pages.filter(|p| *p != RamPages::Small) {
            text += &format!(" of {pages} pages");
        }
        text += if status.dirty_log { ", dirty log on" } else { "" };
    }
    if let Some(attempt) = status.ownership.attempt() {
        text += &format!("\n  session {} epoch {}", attempt.session, attempt.epoch);
    }
    if let Some(mover) = &status.mover {
        text += &format!("\n  {}", mover_line(mover));
    }
    if let Some(awaited) = &status.awaited {
        text += &format!("\n  waits for: {awaited}");
    }
    text
}

/// What the mover has told.
fn mover_line(mover: &MoverState) -> String {
    let report = &mover.report;
    let mut text = format!("{}: {} with {}", mover.program, report.phase, report.address);
    if let Some(pages) = report.owed_pages {
        text += &format!(", {pages} pages owed");
    }
    if mover.gone {
        return text + &format!("; it has been gone for {}", seconds(mover.age_ms));
    }
    match &report.link {
        LinkState::Up => text + ", connected",
        down => text + &format!(", connection {down}"),
    }
}

/// Prints the status of the `vmrun` at `vm`, as `json` or for people.
pub fn print(vm: &Path, json: bool) -> Result<(), ClientError> {
    let status = Client::connect(vm, "vmsend")?.status()?;
    if json {
        output::json(&status)
    } else {
        output::line(text(&status))
    };
    Ok(())
}

/// What the record of a `vmrun` that is gone says about its guest, as the end of a sentence; nothing
/// where there is no record.
pub fn left_behind(vm: &Path) -> Option<String> {
    let SessionRecord { ownership, .. } = SessionRecord::of(vm).ok()??;
    let attempt = ownership.attempt()?;
    Some(format!(
        "its record says that it {ownership}, epoch {}. Its copy of the guest went with it: look at the other host's vmrun with \
         `vmctl SOCK status`; what pages are missing there are lost",
        attempt.epoch
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn it_says_what_the_mover_does_and_what_is_waited_for() {
        let attempt = json!({"session": "07".repeat(16), "epoch": 3});
        let link = json!({"state": "down", "for_ms": 2000, "why": "refused", "tries": 1, "next_try_ms": 100});
        let mut status: Status = serde_json::from_value(json!({
            "run_state": "paused", "summary": "held", "name": "web1", "uuid": "u", "vcpus": 1,
            "memory_bytes": 64 << 20, "dirty_log": false, "mover_attached": true, "pid": 1,
            "ownership": {"phase": "committed", "attempt": attempt, "dest": "tcp:b:7"},
            "awaited": "the link",
            "mover": {"program": "vmsend", "age_ms": 7000, "gone": false, "report":
                {"phase": "reconnect", "address": "tcp:b:7", "moved": true, "owed_pages": 90, "link": link}},
        }))
        .unwrap();
        let said = text(&status);
        let lines: Vec<&str> = said.lines().map(str::trim).collect();
        assert_eq!(lines[..2], ["web1: held", "1 vCPU, 64M memory"]);
        assert!(lines[2].ends_with("epoch 3"), "{said}");
        let mover = "vmsend: reconnect with tcp:b:7, 90 pages owed, connection down for 2.0 s (refused), 1 try to connect, the next in 0.1 s";
        assert_eq!(lines[3..], [mover, "waits for: the link"]);
        status.mover.as_mut().unwrap().gone = true;
        assert!(text(&status).contains("90 pages owed; it has been gone for 7.0 s"), "{}", text(&status));
    }
}
