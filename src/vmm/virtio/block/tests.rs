//! A driver's requests against an image.

use std::path::Path;

use super::super::tests::Host;
use super::*;
use crate::memory::GuestPhysAddr;

const HEADER: u64 = 0x8000;
const STATUS: u64 = 0x9000;
const DATA: u64 = 0xa000;
/// A byte that no status is.
const UNTOUCHED: u8 = 0xee;
const SECTORS: usize = 24;

/// An image whose sectors hold their numbers.
fn image() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), (0..SECTORS * 512).map(|n| (n / 512) as u8).collect::<Vec<_>>()).unwrap();
    file
}

fn config(path: &Path, readonly: bool, direct: bool) -> ImageConfig {
    ImageConfig { path: path.into(), readonly, direct }
}

fn started(block: Block) -> Host {
    let host = Host::with(Box::new(block));
    host.slot.resume();
    host
}

/// A driver that has accepted FLUSH, if it is to, and set up its queue.
fn driven(path: &Path, readonly: bool, direct: bool) -> Host {
    let host = started(Block::open("disk0", &config(path, readonly, direct), None).unwrap());
    host.negotiate(1 << VIRTIO_BLK_F_FLUSH, 1);
    host.set_up_usual();
    host
}

impl Host {
    /// One request with its data, as the `n`th; its status.
    fn ask(&self, n: u16, kind: u32, sector: u64, data: Option<(u32, bool)>) -> u8 {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.ram.write(GuestPhysAddr(HEADER), &header).unwrap();
        self.ram.write(GuestPhysAddr(STATUS), &[UNTOUCHED]).unwrap();
        let mut chain = vec![(HEADER, 16, false)];
        chain.extend(data.map(|(bytes, writable)| (DATA, bytes, writable)));
        chain.push((STATUS, 1, true));
        self.add_chain(n, &chain);
        self.set(0x50, 0);
        self.await_used(n + 1);
        self.peek(STATUS, 1)[0]
    }
}

#[test]
fn a_driver_reads_writes_and_flushes() {
    for direct in [false, true] {
        let file = image();
        let host = match Image::open(&config(file.path(), false, direct)) {
            Ok(_) => driven(file.path(), false, direct),
            Err(e) if direct => {
                // tmpfs of old kernels
                assert!(e.to_string().contains("Invalid argument"), "{e}");
                continue;
            }
            Err(e) => panic!("{e}"),
        };
        let mut space = [0; 24];
        host.slot.read(0x100, &mut space);
        assert_eq!(space[..8], (SECTORS as u64).to_le_bytes());
        assert_eq!(space[20..], (if direct { 4096u32 } else { 512 }).to_le_bytes());
        // Over the boundary of two large blocks, and of no whole one.
        assert_eq!(host.ask(0, VIRTIO_BLK_T_IN, 7, Some((1024, true))), 0);
        assert_eq!(host.used_bytes(0), 1025);
        assert_eq!(host.peek(DATA, 1024), [[7; 512], [8; 512]].concat());
        host.ram.write(GuestPhysAddr(DATA), &[0xab; 1024]).unwrap();
        assert_eq!(host.ask(1, VIRTIO_BLK_T_OUT, 15, Some((1024, false))), 0);
        assert_eq!(host.ask(2, VIRTIO_BLK_T_FLUSH, 0, None), 0);
        let there = std::fs::read(file.path()).unwrap();
        assert_eq!(there[14 * 512..15 * 512], [14; 512]);
        assert_eq!(there[15 * 512..17 * 512], [0xab; 1024]);
        assert_eq!(there[17 * 512..18 * 512], [17; 512]);
        assert_eq!(host.ask(3, VIRTIO_BLK_T_GET_ID, 0, Some((20, true))), 0);
        assert_eq!(host.peek(DATA, 20), b"disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    }
}

#[test]
fn what_cannot_be_done_is_said_in_the_status() {
    let file = image();
    let host = driven(file.path(), false, false);
    let before = std::fs::read(file.path()).unwrap();
    let cases = [
        (VIRTIO_BLK_T_IN, SECTORS as u64, 512, true, VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_IN, SECTORS as u64 - 1, 1024, true, VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_IN, u64::MAX, 512, true, VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_IN, u64::MAX / 512, 512, true, VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_IN, 0, 100, true, VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_OUT, SECTORS as u64, 512, false, VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_OUT, 0, 100, false, VIRTIO_BLK_S_IOERR),
        (12, 0, 512, false, VIRTIO_BLK_S_UNSUPP),
        (VIRTIO_BLK_T_DISCARD, 0, 17, false, VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_DISCARD, 0, 33 * 16, false, VIRTIO_BLK_S_IOERR),
        (77, 0, 512, true, VIRTIO_BLK_S_UNSUPP),
    ];
    for (n, (kind, sector, bytes, writable, status)) in (0..).zip(cases) {
        assert_eq!(u32::from(host.ask(n, kind, sector, Some((bytes, writable)))), status, "{n}");
    }
    assert_eq!(std::fs::read(file.path()).unwrap(), before);
}

#[test]
fn ranges_are_discarded_and_made_zero_and_nothing_around_them() {
    let file = image();
    let host = driven(file.path(), false, false);
    host.set(0x14, 0);
    assert_ne!(host.get(0x10) & 1 << VIRTIO_BLK_F_DISCARD, 0);
    assert_ne!(host.get(0x10) & 1 << VIRTIO_BLK_F_WRITE_ZEROES, 0);
    let mut space = [0; 24];
    host.slot.read(0x100 + 36, &mut space);
    let words: Vec<u32> = space.as_chunks::<4>().0.iter().map(|w| u32::from_le_bytes(*w)).collect();
    assert_eq!(words, [MAX_SECTORS, MAX_RANGES, 8, MAX_SECTORS, MAX_RANGES, 1]);

    let mut requests = 0;
    let mut clear = |kind, ranges: &[(u64, u32, u32)]| {
        let bytes: Vec<u8> = ranges
            .iter()
            .flat_map(|(sector, sectors, flags)| {
                let range =
                    Range { sector: (*sector).into(), sectors: (*sectors).into(), flags: (*flags).into() };
                range.as_bytes().to_vec()
            })
            .collect();
        host.ram.write(GuestPhysAddr(DATA), &bytes).unwrap();
        requests += 1;
        u32::from(host.ask(requests - 1, kind, 0, Some((bytes.len() as u32, false))))
    };
    let sector = |n: usize| std::fs::read(file.path()).unwrap()[n * 512..][..512].to_vec();
    assert_eq!(clear(VIRTIO_BLK_T_WRITE_ZEROES, &[(3, 2, 0), (9, 8, 1)]), VIRTIO_BLK_S_OK);
    for n in 0..SECTORS {
        let cleared = (3..5).contains(&n) || (9..17).contains(&n);
        assert_eq!(sector(n), [if cleared { 0 } else { n as u8 }; 512], "{n}");
    }
    assert_eq!(clear(VIRTIO_BLK_T_DISCARD, &[(18, 2, 0)]), VIRTIO_BLK_S_OK);
    assert_eq!((sector(17), sector(20)), (vec![17; 512], vec![20; 512]));
    assert_eq!(std::fs::metadata(file.path()).unwrap().len() as usize, SECTORS * 512);
    let cases = [
        (VIRTIO_BLK_T_DISCARD, (0, 1, 1), VIRTIO_BLK_S_UNSUPP),
        (VIRTIO_BLK_T_WRITE_ZEROES, (0, 1, 2), VIRTIO_BLK_S_UNSUPP),
        (VIRTIO_BLK_T_WRITE_ZEROES, (SECTORS as u64, 1, 0), VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_WRITE_ZEROES, (SECTORS as u64 - 1, 2, 0), VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_WRITE_ZEROES, (0, u32::MAX, 0), VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_WRITE_ZEROES, (u64::MAX, 1, 0), VIRTIO_BLK_S_IOERR),
        (VIRTIO_BLK_T_DISCARD, (0, 0, 0), VIRTIO_BLK_S_IOERR),
    ];
    for (kind, range, status) in cases {
        assert_eq!(clear(kind, &[range]), status, "{range:?}");
    }
    assert_eq!(sector(0), [0; 512]);
    assert_eq!(sector(1), [1; 512]);
}

#[test]
fn a_long_request_gives_way_to_a_pause_and_is_done_after_it() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let bytes = 64usize << 20;
    file.as_file().set_len(bytes as u64).unwrap();
    let host = driven(file.path(), false, false);
    // The same 256 KiB of memory again and again: 32 MiB in all, in a table of its own.
    let entries: Vec<u8> = (0..130u16)
        .flat_map(|n| {
            let (address, bytes, flags) = match n {
                0 => (HEADER, 16, 1u16),
                129 => (STATUS, 1, 2),
                _ => (0x4_0000u64, 256 << 10, 3),
            };
            [
                &address.to_le_bytes()[..],
                &u32::to_le_bytes(bytes),
                &flags.to_le_bytes(),
                &(n + 1).to_le_bytes(),
            ]
            .concat()
        })
        .collect();
    const TABLE: u64 = 0x10_0000;
    host.set(0x70, 0);
    host.negotiate(1 << VIRTIO_BLK_F_FLUSH | 1 << 28, 1);
    host.clear_rings();
    host.set_up_usual();
    host.ram.write(GuestPhysAddr(TABLE), &entries).unwrap();
    host.ram.write(GuestPhysAddr(HEADER), &[0; 16]).unwrap();
    host.ram.write(GuestPhysAddr(STATUS), &[UNTOUCHED]).unwrap();
    host.add_chain(0, &[(TABLE, entries.len() as u32, false)]);
    host.ram.write(GuestPhysAddr(0x1000 + 12), &4u16.to_le_bytes()).unwrap(); // it is indirect
    host.set(0x50, 0);
    let mut interrupted = 0;
    while host.used() == 0 {
        host.pause();
        let state = host.slot.save().unwrap();
        let waits = state.transport.queues[0].next_available == 0;
        assert_eq!((host.used(), host.peek(STATUS, 1)[0] == UNTOUCHED), (u16::from(!waits), waits));
        interrupted += u32::from(waits);
        host.slot.resume();
        if interrupted > 2 {
            host.await_used(1);
        }
    }
    assert_eq!((host.peek(STATUS, 1)[0], host.used_bytes(0)), (0, (32 << 20) + 1));
}

#[test]
fn a_disk_that_is_only_read_refuses_writes() {
    let file = image();
    let host = driven(file.path(), true, false);
    host.set(0x14, 0);
    assert_ne!(host.get(0x10) & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(u32::from(host.ask(0, VIRTIO_BLK_T_OUT, 0, Some((512, false)))), VIRTIO_BLK_S_IOERR);
    assert_eq!(host.ask(1, VIRTIO_BLK_T_IN, 3, Some((512, true))), 0);
    assert_eq!(std::fs::read(file.path()).unwrap()[..512], [0; 512]);
}

#[test]
fn chains_that_are_no_requests_need_a_reset_and_then_it_goes_on() {
    let file = image();
    let host = driven(file.path(), false, false);
    let malformed: [&[(u64, u32, bool)]; 5] = [
        &[(HEADER, 16, false)],
        &[(HEADER, 8, false), (STATUS, 1, true)],
        &[(STATUS, 1, true)],
        &[(HEADER, 16, false), (1 << 40, 512, true), (STATUS, 1, true)],
        &[(HEADER, 16, false), (STATUS, 0, true)],
    ];
    for chain in malformed {
        host.add_chain(0, chain);
        host.set(0x50, 0);
        host.line_goes(true);
        assert_eq!((host.get(0x70), host.used()), (0x4f, 0), "{chain:x?}");
        host.set(0x70, 0);
        host.line_goes(false);
        host.clear_rings();
        host.negotiate(1 << VIRTIO_BLK_F_FLUSH, 1);
        host.set_up_usual();
    }
    assert_eq!(host.ask(0, VIRTIO_BLK_T_IN, 3, Some((512, true))), 0);
}

#[test]
fn a_disk_is_handed_over_when_it_is_saved_and_no_third_gets_it() {
    let file = image();
    let source = driven(file.path(), false, false);
    assert_eq!(source.ask(0, VIRTIO_BLK_T_IN, 3, Some((512, true))), 0);
    let path = config(file.path(), false, false);
    assert!(Block::open("disk0", &path, None).err().unwrap().to_string().contains("has it open"));
    let said = Block::open("disk0", &path, Some(&BTreeMap::new())).unwrap();
    let properties = said.properties();
    let arriving = || Host::with(Box::new(Block::open("disk0", &path, Some(&properties)).unwrap()));
    source.pause();
    let (early, dest) = (arriving(), arriving());
    let page = source.peek(0, 0xb000);
    dest.ram.write(GuestPhysAddr(0), &page).unwrap();
    early.ram.write(GuestPhysAddr(0), &page).unwrap();
    // A source that is saved and goes on has it to itself again.
    let state = source.slot.save().unwrap();
    source.slot.resume();
    source.pause();
    let refused = early.slot.restore(state).unwrap_err().to_string();
    assert!(refused.contains("has it open"), "{refused}");
    let state = source.slot.save().unwrap();
    dest.slot.restore(state.clone()).unwrap();
    assert!(Block::open("disk0", &path, None).is_err(), "a third");
    // It works while the source still has its lock, and takes the image for itself afterwards.
    dest.slot.resume();
    assert_eq!(dest.ask(1, VIRTIO_BLK_T_IN, 5, Some((512, true))), 0);
    assert_eq!(dest.peek(DATA, 512), [5; 512]);
    let deadline = Instant::now() + Duration::from_secs(20);
    source.slot.quit();
    source.slot.join(deadline);
    while Image::open(&path).unwrap().join().is_ok() {
        assert!(Instant::now() < deadline, "the lock stays shared");
        std::thread::sleep(Duration::from_millis(5));
    }
    let refused = early.slot.restore(state).unwrap_err().to_string();
    assert!(refused.contains("has it open"), "{refused}");
}

#[test]
fn a_destination_takes_the_sources_block_size_and_readonly() {
    let file = image();
    let said = |block: &str, readonly: &str| -> BTreeMap<String, String> {
        [("block_bytes", block), ("readonly", readonly)].map(|(k, v)| (k.into(), v.into())).into()
    };
    let path = config(file.path(), false, false);
    let block = Block::open("disk0", &path, Some(&said("4096", "true"))).unwrap();
    let ours = block.properties();
    assert_eq!((&*ours["block_bytes"], &*ours["readonly"]), ("4096", "true"));
    let block = Block::open("disk0", &path, Some(&said("7", "false"))).unwrap();
    assert_eq!(block.properties()["block_bytes"], "512");
}
