//! Channels between two honest ends.

use std::io::{IoSlice, IoSliceMut};
use std::time::{Duration, Instant};

use super::testing::*;
use super::*;
use crate::memory::PageIndex;
use crate::wire::{Abort, Hello, Message, Run, RunKind, RunTable, Side};

fn hello() -> Message {
    Message::Hello(Hello {
        version_min: 1,
        version_max: 1,
        release: "0".into(),
        host: "a".into(),
        vm_uuid: "u".into(),
        vm_name: "n".into(),
        resume: false,
        superseded: None,
        channels: 1,
        features: vec![],
        verify: false,
        peer_timeout_ms: 5000,
    })
}

fn run(first: u64, pages: u32, kind: RunKind) -> Run {
    Run { first: PageIndex(first), pages, kind }
}

#[test]
fn a_channel_is_what_its_first_frame_says() {
    for (first, role) in [(hello(), ChannelRole::Main), (Message::Join { index: 2 }, ChannelRole::Bulk(2))] {
        let (a, b) = stream_pair();
        let near = Channel::new(a, ATTEMPT, role, options(60_000));
        near.send(&first).unwrap();
        near.send(&Message::Run).unwrap();
        let (mut far, got) = Channel::accept(b, options(60_000)).unwrap();
        assert_eq!((far.attempt(), far.role(), got), (ATTEMPT, role, first));
        assert_eq!(far.recv_message().unwrap(), Message::Run);
    }
}

#[test]
fn pages_arrive_where_they_belong_without_a_copy_in_between() {
    let (near, mut far) = channel_pair(ChannelRole::Bulk(1), options(60_000));
    let memory = noise(256 * 4096);
    let mut table = RunTable::new();
    table.push(run(10, 200, RunKind::Data)).unwrap();
    table.push(run(210, 1_000_000, RunKind::Zero)).unwrap();
    table.push(run(5, 56, RunKind::Data)).unwrap();
    std::thread::scope(|s| {
        s.spawn(|| {
            for _ in 0..3 {
                let bytes = near.sender().send_pages(&table, &pieces(&memory)).unwrap();
                assert_eq!(bytes, 48 + 16 + 3 * 16 + 256 * 4096);
            }
            near.send(&Message::Barrier { pass: 1 }).unwrap();
        });
        far.receiver().accept_pages(2_000_000);
        for _ in 0..3 {
            let Frame::Pages(mut frame) = far.receiver().recv().unwrap() else { panic!("pages") };
            assert_eq!(frame.table, &table);
            let mut got = vec![0; 256 * 4096];
            let (first, second) = got.split_at_mut(200 * 4096);
            frame.data.read(&mut first[..5]).unwrap();
            frame
                .data
                .read_vectored(&mut [
                    IoSliceMut::new(&mut []),
                    IoSliceMut::new(&mut first[5..]),
                    IoSliceMut::new(second),
                ])
                .unwrap();
            assert_eq!(frame.data.left(), 0);
            assert!(matches!(frame.data.read(&mut [0]), Err(ChannelError::Misuse(_))));
            assert!(got == memory);
        }
        assert_eq!(far.recv_message().unwrap(), Message::Barrier { pass: 1 });
    });
    assert_eq!(near.stats().bytes_sent(), far.stats().bytes_received());
}

#[test]
fn page_data_that_is_left_behind_is_never_passed_over() {
    let (near, mut far) = channel_pair(ChannelRole::Main, options(60_000));
    let mut table = RunTable::new();
    table.push(run(0, 1, RunKind::Data)).unwrap();
    let page = noise(4096);
    assert!(matches!(near.sender().send_pages(&table, &[]), Err(ChannelError::Misuse(_))));
    near.sender().send_pages(&table, &[IoSlice::new(&page)]).unwrap();
    far.receiver().accept_pages(64);
    let Frame::Pages(mut frame) = far.receiver().recv().unwrap() else { panic!("pages") };
    frame.data.read(&mut [0; 4095]).unwrap();
    assert!(matches!(far.recv_message(), Err(ChannelError::Misuse(_))));
}

#[test]
fn heartbeats_keep_an_idle_channel_alive_and_measure_it() {
    let (near, mut far) = channel_pair(ChannelRole::Main, options(1000));
    let (near_tx, mut near_rx) = near.split();
    let beat =
        Heartbeat::start(vec![near_tx.clone(), far.sender().clone()], Duration::from_millis(1000)).unwrap();
    // More than twice the time-out without a message.
    let until = Instant::now() + Duration::from_millis(2500);
    std::thread::scope(|s| {
        s.spawn(|| assert!(near_rx.recv_until(until).unwrap().is_none()));
        assert!(far.receiver().recv_until(until).unwrap().is_none());
    });
    // Whoever answers PINGs is not idle, and may never send one: one of the two has measured.
    assert!(near_tx.stats().round_trip().or(far.stats().round_trip()).is_some());
    drop(beat);
    // Without them it is dead soon after.
    let error = far.recv_message().unwrap_err();
    assert!(matches!(error, ChannelError::Stream(StreamError::Silent { ms: 1000, .. })), "{error}");
    assert!(error.to_string().contains("the source has been silent for 1000 ms"), "{error}");
}

#[test]
fn a_wait_with_a_deadline_can_be_taken_up_again() {
    let (near, mut far) = channel_pair(ChannelRole::Main, options(60_000));
    assert!(far.receiver().recv_until(Instant::now()).unwrap().is_none());
    near.send(&Message::Accepted).unwrap();
    let got = far.receiver().recv_until(Instant::now() + LONG).unwrap();
    assert!(matches!(got, Some(Frame::Message(Message::Accepted))));
}

#[test]
fn short_waits_one_after_the_other_notice_silence_as_well() {
    let (_near, mut far) = channel_pair(ChannelRole::Main, options(100));
    let error = loop {
        match far.receiver().recv_until(Instant::now() + Duration::from_millis(10)) {
            Ok(frame) => assert!(frame.is_none()),
            Err(e) => break e,
        }
    };
    assert!(matches!(error, ChannelError::Stream(StreamError::Silent { .. })), "{error}");
}

#[test]
fn many_threads_send_whole_frames() {
    let (near, mut far) = channel_pair(ChannelRole::Main, options(60_000));
    let message = |side| Message::Abort(Abort { side, reason: "x".repeat(100_000) });
    std::thread::scope(|s| {
        for side in [Side::Source, Side::Destination] {
            let (tx, message) = (near.sender().clone(), message(side));
            s.spawn(move || (0..20).for_each(|_| tx.send(&message).unwrap()));
        }
        for _ in 0..40 {
            let Message::Abort(abort) = far.recv_message().unwrap() else { panic!("abort") };
            assert_eq!(abort.reason.len(), 100_000);
        }
    });
}

#[test]
fn closing_delivers_what_was_sent() {
    let (near, mut far) = channel_pair(ChannelRole::Main, options(60_000));
    near.send(&Message::Revoked).unwrap();
    near.sender().close();
    assert!(matches!(near.send(&Message::Run), Err(ChannelError::Dead { .. })));
    // What the other side still says is read and dropped.
    far.send(&Message::Run).unwrap();
    assert_eq!(far.recv_message().unwrap(), Message::Revoked);
    let error = far.recv_message().unwrap_err();
    assert!(matches!(error, ChannelError::Stream(StreamError::Closed { .. })), "{error}");
    drop(far);
    let (_, mut near_rx) = near.split();
    assert!(near_rx.wait_closed(LONG));
}

#[test]
fn waiting_for_a_close_has_an_end() {
    let (near, _far) = channel_pair(ChannelRole::Main, options(60_000));
    let (_tx, mut rx) = near.split();
    assert!(!rx.wait_closed(Duration::from_millis(20)));
}

#[test]
fn cancelling_one_ends_both_directions() {
    let (near, _far) = channel_pair(ChannelRole::Main, options(60_000));
    let (tx, mut rx) = near.split();
    std::thread::scope(|s| {
        let reader = s.spawn(move || rx.recv_message().unwrap_err());
        tx.cancel_token().cancel("the guest has ended");
        let error = reader.join().unwrap();
        assert!(error.is_cancelled() && !error.is_protocol(), "{error}");
        assert!(tx.send(&Message::Run).unwrap_err().is_cancelled());
        assert!(matches!(tx.send(&Message::Run), Err(ChannelError::Dead { .. })));
    });
}
