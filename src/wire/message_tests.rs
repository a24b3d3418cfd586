//! Tests of the messages: what is written is read, and nothing else is.

use proptest::prelude::*;

use super::super::limits::SPARSE_WORDS;
use super::super::{FrameType, Problem, RefusedCode, ResumePhase, Side};
use super::*;
use crate::switchover::{Attempt, SessionId};

fn hello() -> Hello {
    Hello {
        version_min: 1,
        version_max: 1,
        release: "0.1.0".into(),
        host: "a".into(),
        vm_uuid: "u".into(),
        vm_name: "web \"1\"\n".into(),
        resume: true,
        superseded: Some(Attempt { session: SessionId([7; 16]), epoch: 2 }),
        channels: 2,
        features: vec!["must:x".into()],
        verify: true,
        peer_timeout_ms: 5000,
    }
}

/// One of each type.
fn all() -> Vec<Message> {
    let digest = Some("00ff".to_owned());
    vec![
        Message::Hello(hello()),
        Message::HelloAck(HelloAck {
            version: 1,
            features: vec![],
            resume_phase: Some(ResumePhase::InDoubt),
            release: "0.1.0".into(),
            host: "b".into(),
            peer_timeout_ms: 5000,
            fetching: true,
        }),
        Message::Refused(Refused {
            code: RefusedCode::Unsuitable,
            message: "no".into(),
            problems: vec![Problem { topic: "cpuid".into(), text: "avx512f".into() }],
        }),
        Message::Machine(JsonBody::of(&[1, 2, 3]).unwrap()),
        Message::Accepted,
        Message::Join { index: 1 },
        Message::Joined { index: 1 },
        Message::Barrier { pass: 3 },
        Message::PassDone(PassDone { pass: 3, pages_placed: 4, bytes: 5, elapsed_us: 6 }),
        Message::State(vec![0, 1, 2]),
        Message::End(End {
            passes: 3,
            pages: 4,
            zero_pages: 5,
            digest: digest.clone(),
            stays_paused: true,
            postcopy: true,
            ahead: vec![3, 1 << 40],
        }),
        Message::Missing(PageBitmap { first: 64, words: vec![1, u64::MAX] }),
        Message::PageRequest(vec![7, 1 << 40]),
        Message::Received(PageBitmap { first: 0, words: vec![3] }),
        Message::Ready(Ready { import_us: 1, sync_us: 2, digest: None }),
        Message::Run,
        Message::Running(Running { run_us: 9 }),
        Message::Revoke,
        Message::Revoked,
        Message::Abort(Abort { side: Side::Destination, reason: "serial".into() }),
        Message::Done(Done { pages: u64::MAX, zero_pages: 1, digest, latency: None }),
        Message::Released,
        Message::Ping { nonce: 1 << 40 },
        Message::Pong { nonce: 2 },
    ]
}

#[test]
fn every_message_comes_back() {
    let kinds: Vec<_> = all().iter().map(Message::kind).collect();
    for kind in FrameType::ALL {
        assert!(*kind == FrameType::Pages || kinds.contains(kind), "{kind} has no sample");
    }
    for message in all() {
        let payload = message.encode().unwrap();
        assert_eq!(Message::decode(message.kind(), payload), Ok(message));
    }
}

#[test]
fn every_truncation_is_an_error() {
    for message in all() {
        // The mover does not look into the first two: their readers check them. The others are
        // plain words: fewer of them are a message as well.
        if matches!(
            message,
            Message::State(_)
                | Message::Machine(_)
                | Message::Missing(_)
                | Message::PageRequest(_)
                | Message::Received(_)
        ) {
            continue;
        }
        let whole = message.encode().unwrap();
        for n in 0..whole.len() {
            assert!(Message::decode(message.kind(), whole[..n].to_vec()).is_err(), "{message:?} {n}");
        }
        let longer = [&whole[..], b"x"].concat();
        assert!(Message::decode(message.kind(), longer).is_err(), "{message:?}");
    }
}

#[test]
fn fields_of_a_later_version_are_ignored_and_missing_ones_are_named() {
    let later = br#"{"pass":7,"colour":"blue"}"#.to_vec();
    assert_eq!(Message::decode(FrameType::Barrier, later), Ok(Message::Barrier { pass: 7 }));
    let error = Message::decode(FrameType::Barrier, b"{}".to_vec()).unwrap_err();
    assert!(error.to_string().contains("BARRIER") && error.to_string().contains("pass"), "{error}");
    let later = br#"{"code":"tired","message":"no"}"#.to_vec();
    let Ok(Message::Refused(refused)) = Message::decode(FrameType::Refused, later) else {
        panic!("a new code is still a refusal");
    };
    assert_eq!(refused.code, RefusedCode::Other);
}

#[test]
fn what_is_over_the_limit_is_not_written() {
    let large = Message::Abort(Abort { side: Side::Source, reason: "x".repeat(1 << 20) });
    assert!(matches!(large.encode(), Err(MessageError::TooLarge { kind: FrameType::Abort, .. })));
}

#[test]
fn a_bottomless_document_is_an_error() {
    let deep = "[".repeat(1 << 20).into_bytes();
    assert!(Message::decode(FrameType::Hello, deep.clone()).is_err());
    assert!(JsonBody(deep).parse::<serde_json::Value>().is_err());
}

proptest! {
    #[test]
    fn no_payload_panics(
        kind in prop::sample::select(FrameType::ALL),
        bytes in prop::collection::vec(any::<u8>(), 0..100),
        text in "[{}\\[\\]\":,a-z0-9]{0,60}",
    ) {
        let _ = Message::decode(kind, bytes);
        let _ = Message::decode(kind, text.into_bytes());
    }

    #[test]
    fn any_text_comes_back(name: String, reason: String, features: Vec<String>) {
        let message = Message::Hello(Hello { vm_name: name, features, ..hello() });
        prop_assert_eq!(Message::decode(FrameType::Hello, message.encode().unwrap()), Ok(message));
        let message = Message::Abort(Abort { side: Side::Source, reason });
        prop_assert_eq!(Message::decode(FrameType::Abort, message.encode().unwrap()), Ok(message));
    }
}

#[test]
fn a_bitmap_goes_in_parts_and_what_is_empty_of_a_sparse_one_stays_at_home() {
    let mut words = vec![0; 3 * SPARSE_WORDS + 1];
    (words[SPARSE_WORDS + 7], words[3 * SPARSE_WORDS]) = (0b101, 1);
    let parts: Vec<PageBitmap> = PageBitmap::sparse_parts(&words).collect();
    let firsts: Vec<u64> = parts.iter().map(|part| part.first / 64).collect();
    assert_eq!(firsts, [0, SPARSE_WORDS as u64, 3 * SPARSE_WORDS as u64]);
    // Added to what was there.
    let mut all = vec![2; words.len()];
    parts.iter().for_each(|part| part.add_to(FrameType::Missing, &mut all).unwrap());
    assert!(all.iter().zip(&words).all(|(sum, word)| *sum == word | 2));
    assert_eq!(PageBitmap::sparse_parts(&[0; 9]).count(), 1);
    let beyond = PageBitmap { first: 64 * 9, words: vec![1] };
    assert!(beyond.add_to(FrameType::Missing, &mut [0; 9]).is_err());
}
