//! The control socket, both ends: what any client may send to a `vmrun` or a `vmsend`, and what they
//! may answer to a mover.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vmferry::control::mover::{MoverRequest, MoverSettings};
use vmferry::control::{
    Answer, Attached, Client, ClientError, DirtyPages, Event, Failure, FailureCode, Imported, Outcome,
    Postcopy, Prepared, RamLayout, Remap, Request, RunState, StateBlob, Status,
};
use vmferry::fuzzing;
use vmferry::memory::{PageIndex, PageRun, RamPages, VmmAddr};
use vmferry::migrate::ram::Ram;
use vmferry::switchover::{Attempt, OperatorWord, Ownership, SessionId};
use vmferry::sys::bitmap::SharedBitmap;
use vmferry::sys::{fdpass, memfd};

use super::input::{Reader, Writer};
use super::messages::machine;
use super::wire::ATTEMPT;

const RAM_BYTES: u64 = 1 << 20;

pub fn run(data: &[u8]) {
    let mut input = Reader(data);
    match input.u8() % 3 {
        0 => served::<Request>(&mut input),
        1 => served::<MoverRequest>(&mut input),
        _ => asked(&mut input),
    }
}

/// A client sends lines; the server understands them, or answers what is wrong, and keeps nothing.
fn served<R: vmferry::control::ControlRequest>(input: &mut Reader<'_>) {
    let (server, mut client) = UnixStream::pair().expect("a pair of sockets can be made");
    client.set_nonblocking(true).expect("it is a socket");
    say(&client, input);
    let (understood, waiting) = fuzzing::serve_lines::<R>(server, &mut || {
        let mut answers = [0; 4096];
        while client.read(&mut answers).is_ok_and(|bytes| bytes > 0) {}
    });
    assert!(understood <= 65_536 && waiting <= 16 << 20);
}

/// Sends lines, each with some descriptors, and hangs up.
fn say(socket: &UnixStream, input: &mut Reader<'_>) {
    while !input.is_empty() {
        let fds: Vec<OwnedFd> = (0..input.u8() % 4).map(|_| descriptor(input)).collect();
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let mut rest = input.chunk();
        if rest.is_empty() {
            continue;
        }
        match fdpass::send(socket.as_fd(), rest, &fds) {
            Ok(sent) => rest = &rest[sent..],
            Err(_) => break,
        }
        if fdpass::send(socket.as_fd(), &[rest, b"\n"].concat(), &[]).is_err() {
            break;
        }
    }
    let _ = socket.shutdown(std::net::Shutdown::Write);
}

fn descriptor(input: &mut Reader<'_>) -> OwnedFd {
    let made = "a descriptor can be made";
    match input.u8() {
        0 => std::io::pipe().expect(made).0.into(),
        1 => std::fs::File::open("/dev/null").expect(made).into(),
        units => memfd::create_sealed(c"fuzz", u64::from(units) << 14).expect(made).into(),
    }
}

/// A server has said all this when it is asked.
fn asked(input: &mut Reader<'_>) {
    let (client, server) = UnixStream::pair().expect("a pair of sockets can be made");
    client.set_nonblocking(true).expect("it is a socket");
    let requests = input.chunk();
    say(&server, input);
    let mut client = fuzzing::client_of(client);
    for request in requests.iter().take(16) {
        if let Err(error) = ask(&mut client, *request) {
            let _ = (error.to_string(), error.code());
            if error.is_disconnect() {
                return;
            }
        }
    }
}

fn ask(client: &mut Client, request: u8) -> Result<(), ClientError> {
    match request % 21 {
        0 => client.status().map(|status| drop(status.ownership.to_string())),
        1 => client.machine().map(drop),
        2 => client.ram().map(|(layout, fds)| use_ram(&layout, fds)),
        3 => client.attach(Some(ATTEMPT.session), "tcp:hostb:1").map(drop),
        4 => {
            let (dirty, fd) = client.dirty_start()?;
            if let Ok(bitmap) = SharedBitmap::new(fd, dirty.pages) {
                assert_eq!(bitmap.words().len() as u64, dirty.pages.div_ceil(64));
            }
            Ok(())
        }
        5 => client.dirty_take().map(drop),
        6 => client.pause(true).map(drop),
        7 => client.resume(OperatorWord { force: false, peer_fenced: false }).map(drop),
        8 => client.export().map(drop),
        9 => client.fence(ATTEMPT, "tcp:hostb:1"),
        10 => client.release(ATTEMPT, false),
        11 => {
            let remap = vec![Remap { id: "serial0".into(), value: "none".into() }];
            let (prepared, fds) = client.prepare(ATTEMPT, &machine(RAM_BYTES), remap, true)?;
            use_ram(&prepared.ram, fds);
            Ok(())
        }
        12 => client
            .postcopy_arm(ATTEMPT, "unix:/x")
            .map(|(postcopy, _, _)| drop(postcopy.ownership.to_string())),
        13 => client.postcopy_adopt().map(|(postcopy, _, _, fds)| use_ram(&postcopy.ram, fds)),
        14 => client.import(ATTEMPT, std::fs::File::open("/dev/null").expect("it is there"), 10).map(drop),
        15 => client.run(ATTEMPT).map(drop),
        16 => client.revoke(ATTEMPT),
        17 => client.renew(ATTEMPT).map(drop),
        18 => client.next_event::<Event>(Some(Duration::ZERO)).map(drop),
        20 => client.kernel_image().map(drop),
        _ => client.dirty_clear(PageRun { first: PageIndex(0), pages: 1 }),
    }
}

/// What a mover does with RAM that it is handed.
fn use_ram(layout: &RamLayout, fds: Vec<OwnedFd>) {
    // A host may well have huge pages to give, but this is no test of that.
    if layout.pages != RamPages::Small || layout.map.total_bytes() > 64 << 20 {
        return;
    }
    let Ok(ram) = Ram::writable(layout, fds, false) else { return };
    let run = PageRun { first: PageIndex(3), pages: 2 };
    if let Some(span) = ram.span(run) {
        let _ = ram.write(span, &vec![7; span.bytes as usize]);
        let _ = ram.zero(span);
    }
    let _ = ram.digest();
}

pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let mut seeds = Vec::new();
    let (kind, mover) = (0, 1);
    let line = |input: Writer, id: u64, request: serde_json::Value| {
        let mut call = serde_json::json!({ "id": id });
        call.as_object_mut().expect("an object").extend(request.as_object().expect("an object").clone());
        input.u8(0).chunk(call.to_string().as_bytes())
    };
    let hello = serde_json::to_value(Request::Hello { version: 1, client: "vmctl".into() })
        .expect("it can be written");
    for request in requests() {
        let value = serde_json::to_value(&request).expect("it can be written");
        let name = value["cmd"].as_str().expect("it has a name").to_owned();
        let input = line(line(Writer::default().u8(kind), 1, hello.clone()), 2, value);
        seeds.push((format!("request-{name}"), input.0));
    }
    let with_fd =
        Writer::default().u8(kind).u8(0).chunk(br#"{"id":1,"cmd":"hello","version":1,"client":"c"}"#);
    let import = br#"{"id":2,"fds":1,"cmd":"import","attempt":{"session":"5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e5e","epoch":1},"bytes":9}"#;
    seeds.push(("request-fd".into(), with_fd.u8(1).u8(2).chunk(import).0));
    for request in mover_requests() {
        let value = serde_json::to_value(&request).expect("it can be written");
        let name = value["cmd"].as_str().expect("it has a name").to_owned();
        let input = line(line(Writer::default().u8(mover), 1, hello.clone()), 2, value);
        seeds.push((format!("mover-{name}"), input.0));
    }
    for (request, fds, value) in answers() {
        let answer = Answer { id: 1, fds: fds.len() as u32, outcome: Outcome::Ok(value) };
        let text = serde_json::to_vec(&answer).expect("it can be written");
        let input =
            fds.iter().fold(Writer::default().u8(2).chunk(&[request]).u8(fds.len() as u8), |i, fd| i.u8(*fd));
        seeds.push((format!("answer-{request}"), input.chunk(&text).0));
    }
    let failure = Failure::new(FailureCode::Unsuitable, "it cannot be");
    let late = [Outcome::Pending("vcpu 0".into()), Outcome::Error(failure)];
    let input = late.iter().fold(Writer::default().u8(2).chunk(&[0, 18]), |input, outcome| {
        let answer = Answer { id: 1, fds: 0, outcome: outcome.clone() };
        input.u8(0).chunk(&serde_json::to_vec(&answer).expect("it can be written"))
    });
    let event = Event { event: "run-state".into(), time_ms: 1, status: status(), detail: None };
    seeds.push((
        "answer-late".into(),
        input.u8(0).chunk(&serde_json::to_vec(&event).expect("it can be written")).0,
    ));
    seeds
}

fn requests() -> Vec<Request> {
    let attempt = ATTEMPT;
    vec![
        Request::Status,
        Request::Events,
        Request::Machine,
        Request::Ram,
        Request::Attach { session: Some(SessionId([1; 16])), dest: "tcp:hostb:7070".into() },
        Request::DirtyStart,
        Request::KernelImage,
        Request::DirtyTake,
        Request::DirtyClear { first: PageIndex(0), pages: 4096 },
        Request::DirtyPutBack,
        Request::DirtyStop,
        Request::Pause { lease: true },
        Request::Resume { force: true, peer_fenced: true },
        Request::Export,
        Request::Fence { attempt, dest: "tcp:hostb:7070".into() },
        Request::PeerRevoked { attempt },
        Request::Release { attempt, keep: true },
        Request::Quit { force: true },
        Request::Prepare {
            attempt,
            machine: Box::new(machine(RAM_BYTES)),
            remap: vec![Remap { id: "serial0".into(), value: "file:/log".into() }],
            postcopy: true,
        },
        Request::PostcopyArm { attempt, listen: "tcp:127.0.0.1:7070".into() },
        Request::PostcopyAdopt,
        Request::PostcopyDone { attempt },
        Request::Promise { attempt, paused: true },
        Request::Run { attempt },
        Request::Revoke { attempt },
        Request::Renew { attempt: Attempt { epoch: 2, ..attempt } },
    ]
}

fn mover_requests() -> Vec<MoverRequest> {
    vec![
        MoverRequest::Progress,
        MoverRequest::Events,
        MoverRequest::Set { downtime_ms: Some(50), bandwidth_bytes_per_s: Some(0) },
        MoverRequest::Cancel,
        MoverRequest::SwitchNow,
    ]
}

fn status() -> Status {
    Status {
        run_state: RunState::Paused,
        ownership: Ownership::InDoubt { attempt: ATTEMPT },
        summary: "it waits".into(),
        name: Some("guest".into()),
        uuid: None,
        vcpus: 1,
        memory_bytes: RAM_BYTES,
        ram_pages: Some(RamPages::Small),
        dirty_log: false,
        mover_attached: true,
        mover: None,
        awaited: Some("its pages".into()),
        missing_pages: Some(3),
        pid: 1,
    }
}

/// Answers to [`ask`]'s requests, with the descriptors that come along.
fn answers() -> Vec<(u8, Vec<u8>, serde_json::Value)> {
    let value = |v: serde_json::Result<serde_json::Value>| v.expect("it can be written");
    let ram = RamLayout {
        map: machine(RAM_BYTES).ram,
        vmm_addresses: vec![VmmAddr(1 << 40)],
        pages: RamPages::Small,
    };
    let attempt = ATTEMPT;
    let ownership = Ownership::Loading { attempt };
    let postcopy =
        Postcopy { ram: ram.clone(), attempt, listen: "unix:/x".into(), ownership: ownership.clone() };
    let attached = Attached { attempt, superseded: None, ownership, dest: "tcp:hostb:1".into() };
    let settings = MoverSettings { downtime_ms: 1, bandwidth_bytes_per_s: None };
    vec![
        (0, vec![], value(serde_json::to_value(status()))),
        (1, vec![], value(serde_json::to_value(machine(RAM_BYTES)))),
        (2, vec![64], value(serde_json::to_value(&ram))),
        (3, vec![], value(serde_json::to_value(attached))),
        (4, vec![2], value(serde_json::to_value(DirtyPages { pages: 256 }))),
        (5, vec![], value(serde_json::to_value(DirtyPages { pages: 1 }))),
        (
            8,
            vec![2],
            value(serde_json::to_value(StateBlob { bytes: 9, export_us: 1, first_touched: vec![1] })),
        ),
        (9, vec![], serde_json::json!({})),
        (11, vec![64], value(serde_json::to_value(Prepared { ram }))),
        (12, vec![0, 2], value(serde_json::to_value(&postcopy))),
        (13, vec![0, 2, 64], value(serde_json::to_value(&postcopy))),
        (14, vec![], value(serde_json::to_value(Imported { import_us: 1, sync_us: 1 }))),
        (19, vec![], value(serde_json::to_value(settings))),
    ]
}
