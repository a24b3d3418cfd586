//! Streams over real sockets, pipes and children: data, deadlines, ends and cancelling.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use super::testing::*;
use super::*;

/// A stream of each kind whose other end is silent and reads nothing, and what keeps that end.
fn silent_ends() -> Vec<(&'static str, Stream, Box<dyn std::any::Any>)> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap()).parse().unwrap();
    let tcp = connect(&address, LONG, LONG, &token()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let unix_listener = UnixListener::bind(&path).unwrap();
    let unix = connect(&Address::Unix(path), LONG, LONG, &token()).unwrap();
    // `exec` so that killing the shell kills what holds the pipes.
    let exec = connect(&Address::Exec("exec sleep 1000".into()), LONG, LONG, &token()).unwrap();
    vec![
        ("tcp", tcp, Box::new(listener)),
        ("unix", unix, Box::new((unix_listener, dir))),
        ("exec", exec, Box::new(())),
        ("pipe", pipe_loop(), Box::new(())),
    ]
}

/// What is written to `near` comes out of `far`, however it is cut up.
fn carries(near: Stream, mut far: Stream) {
    let data = noise(5 << 20);
    std::thread::scope(|s| {
        s.spawn(|| {
            let mut near = near;
            near.write_all_vectored(&pieces(&data), LONG).unwrap();
            near.read_exact_deadline(&mut [0], LONG).unwrap();
        });
        let mut got = vec![0; data.len()];
        far.read_exact_deadline(&mut got, LONG).unwrap();
        assert!(got == data);
        far.write_all_vectored(&[std::io::IoSlice::new(b"!")], LONG).unwrap();
    });
}

#[test]
fn tcp_carries_large_vectored_writes_over_both_families() {
    for host in ["127.0.0.1", "[::1]", "localhost"] {
        if host == "[::1]" && TcpListener::bind("[::1]:0").is_err() {
            eprintln!("no IPv6 loopback here");
            continue;
        }
        let listener = Listener::bind(&format!("tcp:{host}:0").parse().unwrap(), LONG).unwrap();
        assert!(!listener.local().to_string().ends_with(":0"));
        let near = connect(listener.local(), LONG, LONG, &token()).unwrap();
        let far = listener.accept(None, &token()).unwrap().unwrap();
        carries(near, far);
    }
}

#[test]
fn unix_carries_large_vectored_writes_and_cleans_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let address = Address::Unix(path.clone());
    let listener = Listener::bind(&address, LONG).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let near = connect(&address, LONG, LONG, &token()).unwrap();
    let far = listener.accept(None, &token()).unwrap().unwrap();
    carries(near, far);
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn a_child_carries_what_it_is_given() {
    let stream = connect(&Address::Exec("cat".into()), LONG, LONG, &token()).unwrap();
    let (mut read, mut write) = stream.split();
    let data = noise(5 << 20);
    std::thread::scope(|s| {
        s.spawn(|| write.write_all_vectored(&pieces(&data), LONG).unwrap());
        let mut got = vec![0; data.len()];
        let limits = super::stream::Limits { silence: LONG, whole: None };
        read.read_exact(&mut got, &mut 0, limits).unwrap();
        assert!(got == data);
    });
    write.close();
    let end = read.read_some(
        &mut [std::io::IoSliceMut::new(&mut [0])],
        super::stream::Limits { silence: LONG, whole: None },
    );
    assert_eq!(end.unwrap(), 0);
    let _ = &mut read;
}

#[test]
fn how_a_child_ended_is_part_of_the_error() {
    let mut stream = connect(&Address::Exec("exit 7".into()), LONG, LONG, &token()).unwrap();
    let error = stream.read_exact_deadline(&mut [0], LONG).unwrap_err().to_string();
    assert!(error.contains("exec:exit 7") && error.contains("exit status: 7"), "{error}");
    let mut stream =
        connect(&Address::Exec("/nonexistent/command 2>/dev/null".into()), LONG, LONG, &token()).unwrap();
    let error = stream.read_exact_deadline(&mut [0], LONG).unwrap_err().to_string();
    assert!(error.contains("exit status: 127"), "{error}");
}

#[test]
fn a_child_does_not_outlive_its_stream() {
    let mut stream =
        connect(&Address::Exec("echo $$; exec sleep 1000".into()), LONG, LONG, &token()).unwrap();
    let mut pid = String::new();
    while !pid.ends_with('\n') {
        let mut byte = [0];
        stream.read_exact_deadline(&mut byte, LONG).unwrap();
        pid.push(byte[0] as char);
    }
    drop(stream);
    assert!(!std::path::Path::new(&format!("/proc/{}", pid.trim())).exists());
}

#[test]
fn cancelling_wakes_readers_and_writers_of_every_kind() {
    for (kind, stream, _other) in silent_ends() {
        let cancel = stream.cancel_token().clone();
        let (read, mut write) = stream.split();
        std::thread::scope(|s| {
            // A pipe to itself would feed the reader what the writer writes.
            let reader = (kind != "pipe").then(|| {
                let limits = super::stream::Limits { silence: LONG, whole: None };
                s.spawn(move || read.read_some(&mut [std::io::IoSliceMut::new(&mut [0])], limits).map(|_| ()))
            });
            let writer = s.spawn(move || {
                let data = noise(64 << 20);
                write.write_all_vectored(&[std::io::IoSlice::new(&data)], LONG)
            });
            cancel.cancel("the operator said so");
            for waiter in reader.into_iter().chain([writer]) {
                let error = waiter.join().unwrap().unwrap_err();
                assert_eq!(error.to_string(), "cancelled: the operator said so", "{kind}");
            }
        });
    }
}

#[test]
fn silence_and_standstill_are_told_apart_and_named() {
    let wait = Duration::from_millis(30);
    for (kind, mut stream, _other) in silent_ends() {
        let error = stream.read_exact_deadline(&mut [0], wait).unwrap_err();
        assert!(matches!(error, StreamError::Silent { .. }), "{kind}: {error}");
        let data = noise(64 << 20);
        let error = stream.write_all_vectored(&[std::io::IoSlice::new(&data)], wait).unwrap_err();
        assert!(matches!(error, StreamError::Stuck { ms: 30, .. }), "{kind}: {error}");
    }
}

#[test]
fn an_end_and_a_reset_are_errors_that_name_the_peer() {
    let (mut near, far) = stream_pair();
    drop(far);
    let error = near.read_exact_deadline(&mut [0; 2], LONG).unwrap_err();
    assert!(matches!(&error, StreamError::Truncated { peer, .. } if peer == "the destination"), "{error}");
    let error = near.write_all_vectored(&[std::io::IoSlice::new(b"x")], LONG).unwrap_err();
    assert!(matches!(error, StreamError::Broken { .. }), "{error}");
}

#[test]
fn a_port_that_nobody_listens_on_is_refused_at_once() {
    // Bound and not listening: nobody else can take it meanwhile.
    let held = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    held.bind(&"127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    let port = held.local_addr().unwrap().as_socket().unwrap().port();
    let address = Address::Tcp { host: "127.0.0.1".into(), port };
    let error = connect(&address, LONG, LONG, &token()).unwrap_err().to_string();
    assert!(error.contains(&format!("127.0.0.1:{port}")) && error.contains("refused"), "{error}");
    let error = Listener::bind(&address, LONG).unwrap_err().to_string();
    assert!(error.contains("in use"), "{error}");
}

/// A listener whose queue is full: connecting to it hangs. The callers in the queue come along.
fn full_listener() -> (socket2::Socket, Address, Vec<TcpStream>) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&"127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    socket.listen(0).unwrap();
    let at = socket.local_addr().unwrap().as_socket().unwrap();
    let mut queue = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&at, Duration::from_millis(100)) {
        queue.push(stream);
    }
    (socket, Address::Tcp { host: at.ip().to_string(), port: at.port() }, queue)
}

#[test]
fn connecting_ends_with_its_time_and_with_the_token() {
    let (_socket, address, _queue) = full_listener();
    let begun = Instant::now();
    let error = connect(&address, Duration::from_millis(50), LONG, &token()).unwrap_err().to_string();
    assert!(error.contains("no answer within"), "{error}");
    assert!(begun.elapsed() < LONG);
    let cancel = token();
    std::thread::scope(|s| {
        let caller = s.spawn(|| connect(&address, LONG, LONG, &cancel));
        cancel.cancel("never mind");
        assert!(matches!(caller.join().unwrap(), Err(StreamError::Cancelled { .. })));
    });
}

#[test]
fn accepting_ends_with_its_time_and_with_the_token() {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap(), LONG).unwrap();
    assert!(listener.accept(Some(Instant::now()), &token()).unwrap().is_none());
    let cancel = token();
    std::thread::scope(|s| {
        let waiter = s.spawn(|| listener.accept(None, &cancel));
        cancel.cancel("closing");
        assert!(matches!(waiter.join().unwrap(), Err(StreamError::Cancelled { .. })));
    });
}

#[test]
fn a_stale_socket_is_replaced_and_anything_else_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let address = Address::Unix(path.clone());
    drop(UnixListener::bind(&path).unwrap());
    let listener = Listener::bind(&address, LONG).unwrap();
    let error = Listener::bind(&address, LONG).unwrap_err().to_string();
    assert!(error.contains("another process listens there"), "{error}");
    connect(&address, LONG, LONG, &token()).unwrap();
    // A file that has taken the place of ours is not removed with us.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "mine").unwrap();
    drop(listener);
    let error = Listener::bind(&address, LONG).unwrap_err().to_string();
    assert!(error.contains("not a socket"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
    let missing = Address::Unix(dir.path().join("no/such/dir"));
    assert!(Listener::bind(&missing, LONG).is_err());
    assert!(connect(&missing, LONG, LONG, &token()).is_err());
}

#[test]
fn exec_and_stdio_listen_for_one_stream() {
    let listener = Listener::bind(&Address::Exec("cat".into()), LONG).unwrap();
    assert!(!listener.takes_many());
    let mut stream = listener.accept(None, &token()).unwrap().unwrap();
    stream.write_all_vectored(&[std::io::IoSlice::new(b"ab")], LONG).unwrap();
    let mut got = [0; 2];
    stream.read_exact_deadline(&mut got, LONG).unwrap();
    assert_eq!(&got, b"ab");
    assert!(listener.accept(None, &token()).is_err());
}

#[test]
fn names_that_mean_nothing_are_named() {
    let address = "tcp:no-such-host.invalid:1".parse().unwrap();
    let error = connect(&address, LONG, LONG, &token()).unwrap_err().to_string();
    assert!(error.contains("no-such-host.invalid"), "{error}");
    let error = connect(&"tcp:127.0.0.1:0".parse().unwrap(), LONG, LONG, &token()).unwrap_err();
    assert!(matches!(error, StreamError::Connect { .. }));
}

#[test]
fn a_caller_that_hangs_up_is_only_its_own_loss() {
    let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap(), LONG).unwrap();
    let Address::Tcp { host, port } = listener.local().clone() else { panic!("tcp") };
    drop(TcpStream::connect((host.as_str(), port)).unwrap());
    let mut real = TcpStream::connect((host.as_str(), port)).unwrap();
    real.write_all(b"hi").unwrap();
    let mut gone = listener.accept(None, &token()).unwrap().unwrap();
    assert!(gone.read_exact_deadline(&mut [0], LONG).is_err());
    let mut got = [0; 2];
    let mut stream = listener.accept(None, &token()).unwrap().unwrap();
    stream.read_exact_deadline(&mut got, LONG).unwrap();
    drop(stream);
    assert_eq!(real.read(&mut got).unwrap(), 0);
}
