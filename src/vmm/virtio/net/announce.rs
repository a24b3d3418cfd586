//! Frames that tell a network where a guest has moved to.
//!
//! Bridges and switches learn from the source address of any frame behind which port a station is;
//! until they hear one from the new place they send what is for the guest to the old one. So after a
//! move the host sends some in the guest's name: a RARP request, which every switch learns from and
//! no station answers, and for the addresses that the guest has been seen to use, gratuitous ARP and
//! unsolicited neighbour advertisements, for routers and proxies that look at those alone.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::MacAddress;

/// The shortest Ethernet frame, without its checksum.
const SHORTEST_FRAME_BYTES: usize = 60;
const BROADCAST: [u8; 6] = [0xff; 6];
/// The group of all nodes, ff02::1, as an Ethernet address (RFC 2464, 7).
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_RARP: u16 = 0x8035;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ARP_REQUEST: u16 = 1;
const RARP_REQUEST: u16 = 3;
const ICMPV6: u8 = 58;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// The flag O of an advertisement: what is known of the address is to be replaced (RFC 4861, 4.4).
const OVERRIDE: u8 = 0x20;
/// Where an ICMPv6 message begins behind an IPv6 header without extensions, and its target there.
const ICMPV6_AT: usize = 54;
const TARGET_AT: usize = ICMPV6_AT + 8;

/// A RARP request (RFC 903) in which a station asks for its own address, without knowing one.
pub fn rarp(mac: MacAddress) -> Vec<u8> {
    arp_frame(ETHERTYPE_RARP, RARP_REQUEST, mac, Ipv4Addr::UNSPECIFIED, mac.0, Ipv4Addr::UNSPECIFIED)
}

/// A gratuitous ARP request (RFC 5227, 1.1: an ARP announcement).
pub fn gratuitous_arp(mac: MacAddress, address: Ipv4Addr) -> Vec<u8> {
    arp_frame(ETHERTYPE_ARP, ARP_REQUEST, mac, address, [0; 6], address)
}

/// An unsolicited neighbour advertisement to all nodes (RFC 4861, 7.2.6).
pub fn unsolicited_advertisement(mac: MacAddress, address: Ipv6Addr) -> Vec<u8> {
    let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, OVERRIDE, 0, 0, 0];
    message.extend(address.octets());
    // Option 2: the link-layer address of the target, in units of 8 bytes.
    message.extend([2, 1]);
    message.extend(mac.0);
    let checksum = icmpv6_checksum(address, ALL_NODES, &message);
    message[2..4].copy_from_slice(&checksum.to_be_bytes());

    let mut frame = ethernet(ALL_NODES_MAC, mac, ETHERTYPE_IPV6);
    frame.extend([0x60, 0, 0, 0]);
    frame.extend((message.len() as u16).to_be_bytes());
    // Hop limit 255: whoever gets it knows that it comes from the link.
    frame.extend([ICMPV6, 255]);
    frame.extend(address.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(message);
    frame
}

fn ethernet(to: [u8; 6], from: MacAddress, ethertype: u16) -> Vec<u8> {
    [&to[..], &from.0, &ethertype.to_be_bytes()].concat()
}

fn arp_frame(
    ethertype: u16,
    operation: u16,
    mac: MacAddress,
    sender: Ipv4Addr,
    target_mac: [u8; 6],
    target: Ipv4Addr,
) -> Vec<u8> {
    let mut frame = ethernet(BROADCAST, mac, ethertype);
    // Ethernet addresses of 6 bytes for IPv4 addresses of 4 (RFC 826).
    frame.extend([0, 1, 8, 0, 6, 4]);
    frame.extend(operation.to_be_bytes());
    frame.extend(mac.0);
    frame.extend(sender.octets());
    frame.extend(target_mac);
    frame.extend(target.octets());
    frame.resize(SHORTEST_FRAME_BYTES, 0);
    frame
}

/// The Internet checksum of an ICMPv6 message with its pseudo-header (RFC 8200, 8.1).
fn icmpv6_checksum(from: Ipv6Addr, to: Ipv6Addr, message: &[u8]) -> u16 {
    let pseudo =
        [&from.octets()[..], &to.octets(), &(message.len() as u32).to_be_bytes(), &[0, 0, 0, ICMPV6]];
    let all = [pseudo.concat(), message.to_vec()].concat();
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    let mut sum: u32 = all.chunks(2).map(word).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The addresses that a guest has been seen to use, a few of the latest. What it says is believed:
/// it can send the same frames itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SeenAddresses {
    v4: Vec<Ipv4Addr>,
    v6: Vec<Ipv6Addr>,
}

impl SeenAddresses {
    /// How many of each kind are kept.
    pub const MOST: usize = 8;

    /// Those given, of which each list is cut to [`SeenAddresses::MOST`], and what is nobody's
    /// address is left out.
    pub fn new(v4: &[Ipv4Addr], v6: &[Ipv6Addr]) -> Self {
        let mut seen = Self::default();
        v4.iter().for_each(|a| note(&mut seen.v4, *a, is_usable_v4(*a)));
        v6.iter().for_each(|a| note(&mut seen.v6, *a, is_usable_v6(*a)));
        seen
    }

    /// The IPv4 addresses.
    pub fn v4(&self) -> &[Ipv4Addr] {
        &self.v4
    }

    /// The IPv6 addresses.
    pub fn v6(&self) -> &[Ipv6Addr] {
        &self.v6
    }

    /// Looks at a frame that the guest sends: an ARP packet says which IPv4 address its sender has, a
    /// neighbour advertisement, or a solicitation for another's address, which IPv6 address.
    pub fn look(&mut self, mac: MacAddress, frame: &[u8]) {
        let Some(ethertype) = frame.get(12..14) else { return };
        match u16::from_be_bytes([ethertype[0], ethertype[1]]) {
            ETHERTYPE_ARP if frame.get(22..28) == Some(&mac.0[..]) => {
                if let Some(address) = array(frame, 28).map(Ipv4Addr::from) {
                    note(&mut self.v4, address, is_usable_v4(address));
                }
            }
            ETHERTYPE_IPV6 if frame.get(20) == Some(&ICMPV6) => {
                let address = match frame.get(ICMPV6_AT) {
                    Some(&NEIGHBOUR_ADVERTISEMENT) => array(frame, TARGET_AT),
                    // The source; unspecified while the guest asks whether its own is free.
                    Some(&NEIGHBOUR_SOLICITATION) => array(frame, 22),
                    _ => None,
                };
                if let Some(address) = address.map(Ipv6Addr::from) {
                    note(&mut self.v6, address, is_usable_v6(address));
                }
            }
            _ => {}
        }
    }

    /// Every frame that announces the guest.
    pub fn announcements(&self, mac: MacAddress) -> Vec<Vec<u8>> {
        let mut frames = vec![rarp(mac)];
        frames.extend(self.v4.iter().map(|a| gratuitous_arp(mac, *a)));
        frames.extend(self.v6.iter().map(|a| unsolicited_advertisement(mac, *a)));
        frames
    }
}

fn array<const N: usize>(frame: &[u8], at: usize) -> Option<[u8; N]> {
    frame.get(at..at + N)?.try_into().ok()
}

/// The latest is at the end.
fn note<T: PartialEq>(list: &mut Vec<T>, address: T, usable: bool) {
    if usable && list.last() != Some(&address) {
        list.retain(|a| *a != address);
        if list.len() == SeenAddresses::MOST {
            list.remove(0);
        }
        list.push(address);
    }
}

fn is_usable_v4(a: Ipv4Addr) -> bool {
    !(a.is_unspecified() || a.is_broadcast() || a.is_multicast() || a.is_loopback())
}

fn is_usable_v6(a: Ipv6Addr) -> bool {
    !(a.is_unspecified() || a.is_multicast() || a.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    const V4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 9);

    fn v6(text: &str) -> Ipv6Addr {
        text.parse().unwrap()
    }

    #[test]
    fn a_rarp_request_asks_everybody_for_the_own_address() {
        let frame = rarp(MAC);
        assert_eq!(frame.len(), 60);
        let head = [
            0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 0x12, 0x34, 0x56, 0x80, 0x35, 0, 1, 8, 0, 6,
            4, 0, 3,
        ];
        assert_eq!(frame[..22], head);
        assert_eq!(frame[22..42], [&MAC.0[..], &[0; 4], &MAC.0, &[0; 4]].concat());
    }

    #[test]
    fn a_gratuitous_arp_asks_for_the_own_address_and_tells_it() {
        let frame = gratuitous_arp(MAC, V4);
        assert_eq!(frame[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!(frame[22..42], [&MAC.0[..], &[10, 0, 0, 9], &[0; 6], &[10, 0, 0, 9]].concat());
    }

    #[test]
    fn an_advertisement_is_right_by_its_checksum() {
        let address = v6("fe80::5054:ff:fe12:3456");
        let frame = unsolicited_advertisement(MAC, address);
        assert_eq!(frame.len(), 14 + 40 + 32);
        assert_eq!((frame[20], frame[21]), (58, 255));
        assert_eq!(u16::from_be_bytes([frame[18], frame[19]]), 32);
        // Over a message with its right checksum the sum is zero.
        assert_eq!(icmpv6_checksum(address, ALL_NODES, &frame[ICMPV6_AT..]), 0);
        let small = unsolicited_advertisement(MacAddress([2, 0, 0, 0, 0, 1]), v6("fe80::1"));
        // Pseudo-header fe80 + 1 + ff02 + 1 + 20 + 3a, message 8800 + 2000 + fe80 + 1 + 201 + 200 + 1.
        assert_eq!(u16::from_be_bytes([small[ICMPV6_AT + 2], small[ICMPV6_AT + 3]]), !0xa864);
        assert_eq!(small[ICMPV6_AT + 4], OVERRIDE);
    }

    #[test]
    fn addresses_are_learnt_from_what_the_guest_says_of_itself() {
        let mut seen = SeenAddresses::default();
        seen.look(MAC, &gratuitous_arp(MAC, V4));
        seen.look(MAC, &unsolicited_advertisement(MAC, v6("fe80::1")));
        // Asking whether an address is free is not having it; nor is having somebody else's.
        seen.look(MAC, &rarp(MAC));
        seen.look(MAC, &gratuitous_arp(MAC, Ipv4Addr::UNSPECIFIED));
        seen.look(MAC, &gratuitous_arp(MacAddress([2; 6]), Ipv4Addr::new(10, 0, 0, 10)));
        assert_eq!((seen.v4(), seen.v6()), (&[V4][..], &[v6("fe80::1")][..]));
        let frames = seen.announcements(MAC);
        assert_eq!(
            frames,
            [rarp(MAC), gratuitous_arp(MAC, V4), unsolicited_advertisement(MAC, v6("fe80::1"))]
        );
    }

    #[test]
    fn only_the_latest_addresses_are_kept_and_short_frames_are_nothing() {
        let mut seen = SeenAddresses::default();
        for n in 1..=20 {
            seen.look(MAC, &gratuitous_arp(MAC, Ipv4Addr::new(10, 0, 0, n)));
        }
        assert_eq!(seen.v4().len(), SeenAddresses::MOST);
        assert_eq!(seen.v4().last(), Some(&Ipv4Addr::new(10, 0, 0, 20)));
        let whole = [gratuitous_arp(MAC, V4), unsolicited_advertisement(MAC, v6("fe80::2"))];
        for frame in &whole {
            for n in 0..frame.len() {
                seen.look(MAC, &frame[..n]);
            }
        }
        let many: Vec<Ipv4Addr> = (0..100).map(|n| Ipv4Addr::new(10, 1, 0, n)).collect();
        assert_eq!(SeenAddresses::new(&many, &[v6("::1")]), SeenAddresses::new(&many[92..], &[]));
    }
}
