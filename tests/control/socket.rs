//! The socket file and what comes over it, good or bad. No guest is needed.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use vmferry::control::{Client, ClientError, MAX_CONNECTIONS, MAX_LINE_BYTES, RunState};

use crate::host::{PATIENCE, Vmrun, vmctl, vmrun_fails};

fn raw(vmrun: &Vmrun) -> (UnixStream, BufReader<UnixStream>) {
    let stream = UnixStream::connect(vmrun.socket()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let reader = BufReader::new(stream.try_clone().unwrap());
    (stream, reader)
}

fn line(reader: &mut BufReader<UnixStream>) -> String {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    line
}

/// Ends the listener for good: a child of another test, between fork and exec, may have it open too.
fn dead(path: &Path, listener: UnixListener) {
    drop(listener);
    let until = Instant::now() + PATIENCE;
    while UnixStream::connect(path).is_ok() {
        assert!(Instant::now() < until, "someone still listens");
    }
}

#[test]
fn the_socket_is_for_its_owner_only_and_goes_at_the_end() {
    let mut vmrun = Vmrun::incoming();
    let meta = fs::metadata(vmrun.socket()).unwrap();
    assert!(meta.file_type().is_socket());
    assert_eq!(meta.permissions().mode() & 0o7777, 0o600);
    assert_eq!(vmctl(&vmrun, &["quit"]).0, 0);
    assert_eq!(vmrun.end().0, 0);
    assert!(!vmrun.socket().exists());
}

#[test]
fn a_live_socket_is_never_taken() {
    let vmrun = Vmrun::incoming();
    let (code, text) = vmrun_fails(vmrun.dir.path(), &["--incoming"]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("vm.sock") && text.contains(&format!("process {}", vmrun.pid())), "{text}");
    assert_eq!(vmrun.status().run_state, RunState::Empty);
}

#[test]
fn a_socket_that_a_dead_program_left_is_replaced_and_other_files_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.sock");
    dead(&path, UnixListener::bind(&path).unwrap());
    let vmrun = Vmrun::start_in(dir, &["--incoming"]);
    assert_eq!(vmrun.status().pid as i32, vmrun.pid());
    for text in ["", "precious"] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("vm.sock"), text).unwrap();
        let (code, said) = vmrun_fails(dir.path(), &["--incoming"]);
        assert_eq!(code, 1);
        assert!(said.contains("no socket"), "{said}");
        assert_eq!(fs::read_to_string(dir.path().join("vm.sock")).unwrap(), text);
    }
}

#[test]
fn of_many_that_start_at_once_one_gets_the_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.sock");
    dead(&path, UnixListener::bind(&path).unwrap());
    let program = env!("CARGO_BIN_EXE_vmrun");
    let mut all: Vec<_> = (0..6)
        .map(|_| {
            let mut command = std::process::Command::new(program);
            command.current_dir(dir.path()).args(["--incoming", "--serial", "none", "--control", "vm.sock"]);
            command.stderr(std::process::Stdio::null()).spawn().unwrap()
        })
        .collect();
    let until = Instant::now() + PATIENCE;
    while all.iter_mut().filter_map(|c| c.try_wait().unwrap()).count() < 5 {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(2));
    }
    let client = Client::connect(&dir.path().join("vm.sock"), "test").unwrap();
    let mut left = all.into_iter().filter_map(|mut c| c.try_wait().unwrap().is_none().then_some(c));
    let mut winner = left.next().unwrap();
    assert_eq!(client.server().pid, winner.id());
    winner.kill().unwrap();
    winner.wait().unwrap();
}

#[test]
fn garbage_is_answered_and_ends_only_its_own_connection() {
    let vmrun = Vmrun::incoming();
    for garbage in [&b"hello\n"[..], b"[1]\n", b"\xff\xfe\n", b"{\"id\":1\n", b"7\n"] {
        let (mut stream, mut reader) = raw(&vmrun);
        stream.write_all(garbage).unwrap();
        assert!(line(&mut reader).contains(r#""code":"usage""#));
        assert_eq!(reader.read(&mut [0]).unwrap_or(0), 0, "disconnected");
    }
    // A JSON line that is no request is answered under its number, and the connection goes on.
    let (mut stream, mut reader) = raw(&vmrun);
    let hello = br#"{"id":1,"cmd":"hello","version":1,"client":"t"}"#;
    stream.write_all(&[b"{\"id\":9,\"cmd\":\"status\"}\n", &hello[..], b"\n"].concat()).unwrap();
    let early = line(&mut reader);
    assert!(early.contains(r#""id":9"#) && early.contains("hello"), "{early}");
    assert!(line(&mut reader).contains(r#""program":"vmrun""#));
    for request in [
        r#"{"id":3,"cmd":"dance"}"#,
        r#"{"id":3}"#,
        r#"{"id":3,"cmd":"fence"}"#,
        r#"{"id":3,"cmd":"import","attempt":{"session":"x","epoch":1},"bytes":1}"#,
    ] {
        writeln!(stream, "{request}").unwrap();
        let answer = line(&mut reader);
        assert!(answer.contains(r#""id":3"#) && answer.contains(r#""code":"usage""#), "{answer}");
    }
    writeln!(stream, "{{\"id\":4,\"fds\":2,\"cmd\":\"status\"}}").unwrap();
    assert!(line(&mut reader).contains("fewer came"));
    writeln!(stream, "{{\"id\":5,\"cmd\":\"status\"}}").unwrap();
    assert!(line(&mut reader).contains(r#""run_state":"empty""#));
    assert_eq!(vmrun.status().run_state, RunState::Empty);
}

#[test]
fn a_client_of_another_version_is_refused() {
    let vmrun = Vmrun::incoming();
    let (mut stream, mut reader) = raw(&vmrun);
    writeln!(stream, r#"{{"id":1,"cmd":"hello","version":99,"client":"t"}}"#).unwrap();
    let answer = line(&mut reader);
    assert!(answer.contains("version 1") && answer.contains("version 99"), "{answer}");
}

#[test]
fn an_endless_line_ends_its_connection() {
    let vmrun = Vmrun::incoming();
    let (mut stream, mut reader) = raw(&vmrun);
    let piece = vec![b'x'; 1 << 20];
    // The server hangs up somewhere on the way.
    let sent = (0..2 * MAX_LINE_BYTES / piece.len()).find(|_| stream.write_all(&piece).is_err());
    assert!(sent.is_some());
    assert!(line(&mut reader).contains("longer than"));
    assert_eq!(vmrun.status().run_state, RunState::Empty);
}

#[test]
fn a_hundred_connections_are_too_many_and_do_no_harm() {
    let vmrun = Vmrun::incoming();
    let mut held = Vec::new();
    let mut refused = 0;
    for _ in 0..100 {
        match Client::connect(&vmrun.socket(), "test") {
            Ok(client) => held.push(client),
            Err(e) => {
                assert!(matches!(e, ClientError::Refused { .. }), "{e:?}");
                refused += 1;
            }
        }
    }
    assert_eq!((held.len(), refused), (MAX_CONNECTIONS, 100 - MAX_CONNECTIONS));
    for client in &mut held {
        assert_eq!(client.status().unwrap().run_state, RunState::Empty);
    }
    drop(held);
    vmrun.until("there is room again", || Client::connect(&vmrun.socket(), "test").is_ok());
}

#[test]
fn a_reader_of_events_that_reads_nothing_is_dropped_and_others_are_served() {
    let vmrun = Vmrun::incoming();
    let (mut stream, mut reader) = raw(&vmrun);
    writeln!(stream, r#"{{"id":1,"cmd":"hello","version":1,"client":"t"}}"#).unwrap();
    line(&mut reader);
    stream.set_nonblocking(true).unwrap();
    // Asks for more than the server keeps for one reader, and reads none of it.
    let ask = "{\"id\":2,\"cmd\":\"status\"}\n".repeat(1000);
    let until = Instant::now() + PATIENCE;
    loop {
        match stream.write(ask.as_bytes()) {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(1))
            }
            Err(_) => break,
            Ok(_) => {}
        }
        assert_eq!(vmrun.status().run_state, RunState::Empty);
        assert!(Instant::now() < until, "never dropped");
    }
}

#[test]
fn a_client_says_what_is_wrong_with_the_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let says_within = |timeout, what: &str| {
        let error = Client::connect_within(&path, "test", timeout).unwrap_err().to_string();
        assert!(error.contains(what) && error.contains("/s"), "{error}");
    };
    let says = |what: &str| says_within(PATIENCE, what);
    says("no such control socket");
    fs::write(&path, "").unwrap();
    says("no socket");
    fs::remove_file(&path).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    says_within(Duration::from_millis(50), "does not answer");
    let other = std::thread::spawn(move || {
        // The backlog holds the client that has given up.
        drop(listener.accept().unwrap());
        listener.accept().unwrap().0.write_all(b"220 mail ready\n").unwrap();
        drop(listener.accept().unwrap());
        listener
    });
    says("no JSON");
    says("closes the connection");
    dead(&path, other.join().unwrap());
    says("nobody listens");
}

#[test]
fn a_client_notices_that_the_server_goes() {
    let mut vmrun = Vmrun::incoming();
    let mut client = vmrun.client();
    assert!(client.is_alive());
    client.subscribe().unwrap();
    vmrun.signal(Signal::SIGTERM);
    let (code, _) = vmrun.end();
    assert_eq!(code, 143);
    assert!(!client.is_alive());
    assert_eq!(client.events::<vmferry::control::Event>().filter(|e| e.is_err()).count(), 0);
    assert!(client.status().unwrap_err().is_disconnect());
    assert!(!vmrun.socket().exists());
}
