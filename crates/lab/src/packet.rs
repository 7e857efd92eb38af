//! One IPv4 packet: its addresses and ports, and rewriting them with the checksums kept right.
//!
//! Only what a router and a NAT look at is read. Checksums are updated by difference (RFC 1624) and never computed anew, so a
//! packet that arrives damaged leaves damaged, as it would from a real device.

use std::net::{Ipv4Addr, SocketAddrV4};

/// An IPv4 header without options, in bytes.
const HEADER_BYTES_MIN: usize = 20;
const PROTOCOL_ICMP: u8 = 1;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
const ICMP_ECHO_REPLY: u8 = 0;
const ICMP_ECHO_REQUEST: u8 = 8;
/// Offsets in the IPv4 header.
const CHECKSUM_AT: usize = 10;
const SOURCE_AT: usize = 12;
const DESTINATION_AT: usize = 16;

/// What a NAT can translate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP echo. The identifier stands in for the port of the side that asks; the other side's port is 0.
    Echo,
}

/// Where the rewriteable numbers of a packet lie, in bytes from its beginning.
#[derive(Clone, Copy, Debug)]
struct Layout {
    transport: Transport,
    source_port: Option<usize>,
    destination_port: Option<usize>,
    checksum: usize,
}

/// The two ends of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// What carries it.
    pub transport: Transport,
    /// Address and port (or echo identifier) of the sender.
    pub source: SocketAddrV4,
    /// Address and port (or echo identifier) of the receiver.
    pub destination: SocketAddrV4,
}

/// A checked IPv4 packet.
#[derive(Clone, Debug)]
pub struct Packet {
    bytes: Vec<u8>,
    layout: Option<Layout>,
}

impl Packet {
    /// Takes bytes as they come from a TUN device. None where they are no IPv4 packet, or a cut one; bytes after the
    /// packet's own length are dropped.
    pub fn parse(mut bytes: Vec<u8>) -> Option<Self> {
        let first = *bytes.first()?;
        let header_bytes = usize::from(first & 0x0f) * 4;
        if first >> 4 != 4 || header_bytes < HEADER_BYTES_MIN || bytes.len() < header_bytes {
            return None;
        }
        let total_bytes = usize::from(read_u16(&bytes, 2));
        if total_bytes < header_bytes || total_bytes > bytes.len() {
            return None;
        }
        bytes.truncate(total_bytes);
        let layout = layout(&bytes, header_bytes);
        Some(Self { bytes, layout })
    }

    /// The packet as it goes over the wire.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Its length on the wire.
    pub fn length_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Who sent it, as the header says.
    pub fn source(&self) -> Ipv4Addr {
        self.address(SOURCE_AT)
    }

    /// Where it goes, as the header says.
    pub fn destination(&self) -> Ipv4Addr {
        self.address(DESTINATION_AT)
    }

    /// Both ends with their ports. None for fragments and for all that is not TCP, UDP or ICMP echo.
    pub fn flow(&self) -> Option<Flow> {
        let layout = self.layout?;
        let port = |at: Option<usize>| at.map_or(0, |at| read_u16(&self.bytes, at));
        Some(Flow {
            transport: layout.transport,
            source: SocketAddrV4::new(self.source(), port(layout.source_port)),
            destination: SocketAddrV4::new(self.destination(), port(layout.destination_port)),
        })
    }

    /// Makes it come from elsewhere. Without effect where there is no [`flow`](Self::flow).
    pub fn set_source(&mut self, source: SocketAddrV4) {
        if let Some(layout) = self.layout {
            self.rewrite(SOURCE_AT, layout.source_port, source, layout);
        }
    }

    /// Sends it elsewhere. Without effect where there is no [`flow`](Self::flow).
    pub fn set_destination(&mut self, destination: SocketAddrV4) {
        if let Some(layout) = self.layout {
            self.rewrite(DESTINATION_AT, layout.destination_port, destination, layout);
        }
    }

    fn address(&self, at: usize) -> Ipv4Addr {
        let b = &self.bytes;
        Ipv4Addr::new(b[at], b[at + 1], b[at + 2], b[at + 3])
    }

    fn rewrite(&mut self, address_at: usize, port_at: Option<usize>, to: SocketAddrV4, layout: Layout) {
        // A UDP checksum of 0 says that there is none.
        let unchecked = layout.transport == Transport::Udp && read_u16(&self.bytes, layout.checksum) == 0;
        for (at, word) in [(address_at, 0), (address_at + 2, 2)] {
            let octets = to.ip().octets();
            let (old, new) = (read_u16(&self.bytes, at), u16::from_be_bytes([octets[word], octets[word + 1]]));
            write_u16(&mut self.bytes, at, new);
            update_checksum(&mut self.bytes, CHECKSUM_AT, old, new);
            // TCP and UDP sum the addresses as well (the pseudo header), ICMP does not.
            if !unchecked && layout.transport != Transport::Echo {
                update_checksum(&mut self.bytes, layout.checksum, old, new);
            }
        }
        if let Some(at) = port_at {
            let old = read_u16(&self.bytes, at);
            write_u16(&mut self.bytes, at, to.port());
            if !unchecked {
                update_checksum(&mut self.bytes, layout.checksum, old, to.port());
            }
        }
        if layout.transport == Transport::Udp && !unchecked && read_u16(&self.bytes, layout.checksum) == 0 {
            write_u16(&mut self.bytes, layout.checksum, 0xffff);
        }
    }
}

fn layout(bytes: &[u8], header_bytes: usize) -> Option<Layout> {
    let more_fragments_or_offset = read_u16(bytes, 6) & 0x3fff;
    if more_fragments_or_offset != 0 {
        return None;
    }
    let payload_bytes = bytes.len() - header_bytes;
    let ports = |transport, checksum| Layout {
        transport,
        source_port: Some(header_bytes),
        destination_port: Some(header_bytes + 2),
        checksum: header_bytes + checksum,
    };
    match bytes[9] {
        PROTOCOL_TCP if payload_bytes >= 20 => Some(ports(Transport::Tcp, 16)),
        PROTOCOL_UDP if payload_bytes >= 8 => Some(ports(Transport::Udp, 6)),
        PROTOCOL_ICMP if payload_bytes >= 8 => {
            let identifier = Some(header_bytes + 4);
            let (source_port, destination_port) = match bytes[header_bytes] {
                ICMP_ECHO_REQUEST => (identifier, None),
                ICMP_ECHO_REPLY => (None, identifier),
                _ => return None,
            };
            Some(Layout { transport: Transport::Echo, source_port, destination_port, checksum: header_bytes + 2 })
        }
        _ => None,
    }
}

fn read_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn write_u16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// RFC 1624, equation 3: the checksum after one 16-bit word of what it covers has changed.
fn update_checksum(bytes: &mut [u8], at: usize, old: u16, new: u16) {
    let mut sum = u32::from(!read_u16(bytes, at)) + u32::from(!old) + u32::from(new);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    // The loop leaves 16 bits.
    write_u16(bytes, at, !(sum as u16));
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sum(words: &[u8], start: u32) -> u16 {
        let mut sum = start;
        for pair in words.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    fn pseudo_header(bytes: &[u8], protocol: u8) -> u32 {
        let words = |at| u32::from(read_u16(bytes, at)) + u32::from(read_u16(bytes, at + 2));
        words(SOURCE_AT) + words(DESTINATION_AT) + u32::from(protocol) + (bytes.len() - HEADER_BYTES_MIN) as u32
    }

    /// Whether both checksums of a packet without options are right.
    fn is_sound(packet: &Packet) -> bool {
        let bytes = packet.bytes();
        let start = if bytes[9] == PROTOCOL_ICMP { 0 } else { pseudo_header(bytes, bytes[9]) };
        sum(&bytes[..HEADER_BYTES_MIN], 0) == 0 && sum(&bytes[HEADER_BYTES_MIN..], start) == 0
    }

    /// A packet as a kernel would send it. For echo the sender's port is the identifier and the packet a request, unless it
    /// is 0: then the receiver's is, and it is a reply.
    pub(crate) fn packet(transport: Transport, source: SocketAddrV4, destination: SocketAddrV4, data: &[u8]) -> Packet {
        let (protocol, mut payload, checksum) = match transport {
            Transport::Tcp => (PROTOCOL_TCP, vec![0; 20], 16),
            Transport::Udp => (PROTOCOL_UDP, vec![0; 8], 6),
            Transport::Echo => (PROTOCOL_ICMP, vec![0; 8], 2),
        };
        match transport {
            Transport::Echo if source.port() != 0 => {
                payload[0] = ICMP_ECHO_REQUEST;
                write_u16(&mut payload, 4, source.port());
            }
            Transport::Echo => write_u16(&mut payload, 4, destination.port()),
            Transport::Tcp | Transport::Udp => {
                write_u16(&mut payload, 0, source.port());
                write_u16(&mut payload, 2, destination.port());
            }
        }
        payload.extend_from_slice(data);
        if transport == Transport::Udp {
            let length = payload.len() as u16;
            write_u16(&mut payload, 4, length);
        }
        let mut bytes = vec![0; HEADER_BYTES_MIN];
        bytes[0] = 0x45;
        bytes[8] = 64;
        bytes[9] = protocol;
        bytes[SOURCE_AT..SOURCE_AT + 4].copy_from_slice(&source.ip().octets());
        bytes[DESTINATION_AT..DESTINATION_AT + 4].copy_from_slice(&destination.ip().octets());
        let total = (HEADER_BYTES_MIN + payload.len()) as u16;
        write_u16(&mut bytes, 2, total);
        let header_sum = sum(&bytes, 0);
        write_u16(&mut bytes, CHECKSUM_AT, header_sum);
        bytes.extend_from_slice(&payload);
        let start = if protocol == PROTOCOL_ICMP { 0 } else { pseudo_header(&bytes, protocol) };
        let payload_sum = sum(&bytes[HEADER_BYTES_MIN..], start);
        write_u16(&mut bytes, HEADER_BYTES_MIN + checksum, payload_sum);
        Packet::parse(bytes).unwrap()
    }

    fn any_transport() -> impl Strategy<Value = Transport> {
        prop_oneof![Just(Transport::Tcp), Just(Transport::Udp), Just(Transport::Echo)]
    }

    fn any_end() -> impl Strategy<Value = SocketAddrV4> {
        (any::<u32>(), 1u16..).prop_map(|(ip, port)| SocketAddrV4::new(ip.into(), port))
    }

    proptest! {
        #[test]
        fn rewriting_both_ends_leaves_both_checksums_right(
            transport in any_transport(),
            ends in (any_end(), any_end(), any_end(), any_end()),
            data in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            let (source, destination, new_source, new_destination) = ends;
            let mut packet = packet(transport, source, destination, &data);
            prop_assert!(is_sound(&packet));
            packet.set_source(new_source);
            packet.set_destination(new_destination);
            let flow = packet.flow().unwrap();
            prop_assert_eq!(flow.source, new_source);
            prop_assert_eq!(flow.destination.ip(), new_destination.ip());
            prop_assert!(transport == Transport::Echo || flow.destination == new_destination);
            let udp_sum = read_u16(packet.bytes(), HEADER_BYTES_MIN + 6);
            prop_assert!(transport != Transport::Udp || udp_sum != 0, "0 would say that there is no checksum");
            prop_assert!(is_sound(&packet));
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..80), first in 0x40u8..0x4f) {
            let mut bytes = bytes;
            if let Some(byte) = bytes.first_mut() {
                *byte = first;
            }
            if let Some(mut packet) = Packet::parse(bytes) {
                let end = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 7);
                packet.set_source(end);
                packet.set_destination(end);
                packet.flow();
            }
        }
    }

    #[test]
    fn a_udp_packet_without_checksum_stays_without() {
        let end = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 7);
        let mut bytes = packet(Transport::Udp, end, end, b"data").bytes().to_vec();
        write_u16(&mut bytes, HEADER_BYTES_MIN + 6, 0);
        let mut packet = Packet::parse(bytes).unwrap();
        packet.set_source(SocketAddrV4::new(Ipv4Addr::new(9, 8, 7, 6), 5));
        assert_eq!(read_u16(packet.bytes(), HEADER_BYTES_MIN + 6), 0);
    }

    #[test]
    fn fragments_and_other_protocols_have_no_flow() {
        let end = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 7);
        let whole = packet(Transport::Udp, end, end, b"data").bytes().to_vec();
        let mut fragment = whole.clone();
        write_u16(&mut fragment, 6, 0x2000);
        assert!(Packet::parse(fragment).unwrap().flow().is_none());
        let mut igmp = whole;
        igmp[9] = 2;
        assert!(Packet::parse(igmp).unwrap().flow().is_none());
    }
}
