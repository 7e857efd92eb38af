//! The rules that fields of many messages share.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use super::error::MessageError;
use super::proto;

/// Refuses text that is too long or could play tricks on a terminal.
pub(super) fn text(what: &'static str, text: &str, bytes_max: usize) -> Result<(), MessageError> {
    if text.len() > bytes_max {
        return Err(MessageError::TooLarge { what, bytes: text.len(), limit: bytes_max });
    }
    if text.chars().any(char::is_control) {
        return Err(MessageError::Invalid { what, why: "it holds control characters" });
    }
    Ok(())
}

/// Text for people, made fit to send or to print: control characters become blanks, and what is too long is cut.
pub(super) fn cleaned(text: &str, bytes_max: usize) -> String {
    let mut clean = String::with_capacity(text.len().min(bytes_max));
    for character in text.chars().map(|c| if c.is_control() { ' ' } else { c }) {
        if clean.len() + character.len_utf8() > bytes_max {
            break;
        }
        clean.push(character);
    }
    clean
}

/// Refuses a list that is too long.
pub(super) fn count(what: &'static str, count: usize, limit: usize) -> Result<(), MessageError> {
    if count > limit { Err(MessageError::TooMany { what, count, limit }) } else { Ok(()) }
}

/// Refuses too many bytes.
pub(super) fn size(what: &'static str, bytes: usize, limit: usize) -> Result<(), MessageError> {
    if bytes > limit { Err(MessageError::TooLarge { what, bytes, limit }) } else { Ok(()) }
}

/// Bytes of a fixed length.
pub(super) fn array<const N: usize>(what: &'static str, bytes: &[u8]) -> Result<[u8; N], MessageError> {
    match bytes.try_into() {
        Ok(array) => Ok(array),
        Err(_) if bytes.is_empty() => Err(MessageError::Missing(what)),
        Err(_) => Err(MessageError::Invalid { what, why: "it has the wrong length" }),
    }
}

/// 32-byte values one after the other.
pub(super) fn ids<Id: From<[u8; 32]>>(
    what: &'static str,
    bytes: &[u8],
    limit: usize,
) -> Result<impl Iterator<Item = Id>, MessageError> {
    let (ids, rest) = bytes.as_chunks::<32>();
    if !rest.is_empty() {
        return Err(MessageError::Invalid { what, why: "its length is not a multiple of 32" });
    }
    count(what, ids.len(), limit)?;
    Ok(ids.iter().map(|id| Id::from(*id)))
}

/// The addresses of a set, as protobuf has them.
pub(super) fn address_to_proto(address: &SocketAddr) -> proto::SocketAddress {
    let ip = match address.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    proto::SocketAddress { ip, port: u32::from(address.port()) }
}

/// A socket address that one can dial.
pub(super) fn address_from_proto(address: &proto::SocketAddress) -> Result<SocketAddr, MessageError> {
    const WHAT: &str = "socket address";
    let ip = match address.ip.len() {
        4 => IpAddr::from(array::<4>(WHAT, &address.ip)?),
        16 => IpAddr::from(array::<16>(WHAT, &address.ip)?),
        _ => return Err(MessageError::Invalid { what: WHAT, why: "an IP address has 4 or 16 bytes" }),
    };
    let port = u16::try_from(address.port).map_err(|_| MessageError::Invalid { what: WHAT, why: "no such port" })?;
    let address = SocketAddr::new(ip, port);
    if is_dialable(&address) {
        Ok(address)
    } else {
        Err(MessageError::Invalid { what: WHAT, why: "nobody can be dialled there" })
    }
}

/// False for addresses that would turn a dialler against itself or a whole network.
pub(super) fn is_dialable(address: &SocketAddr) -> bool {
    let broadcast = matches!(address.ip(), IpAddr::V4(ip) if ip.is_broadcast());
    address.port() != 0 && !address.ip().is_unspecified() && !address.ip().is_multicast() && !broadcast
}

/// True when no value occurs twice.
pub(super) fn all_differ<T: Ord>(values: impl IntoIterator<Item = T>) -> bool {
    let mut seen = BTreeSet::new();
    values.into_iter().all(|value| seen.insert(value))
}

/// Derives the two functions between an enumeration of ours and protobuf's. Numbers that this version does not know
/// become `Unknown`, so that a newer peer's message stays readable.
macro_rules! open_enum {
    ($ours:ident { $($variant:ident),* $(,)? }) => {
        impl $ours {
            pub(super) fn from_wire(number: i32) -> Self {
                match crate::mesh::proto::$ours::try_from(number) {
                    $(Ok(crate::mesh::proto::$ours::$variant) => Self::$variant,)*
                    _ => Self::Unknown,
                }
            }

            pub(super) fn to_wire(self) -> i32 {
                match self {
                    $(Self::$variant => crate::mesh::proto::$ours::$variant.into(),)*
                    Self::Unknown => 0,
                }
            }
        }
    };
}
pub(super) use open_enum;
