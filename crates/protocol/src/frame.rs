//! The frame: what travels between a driver and a stage, and between stages. A fixed little-endian header, then raw
//! payload; the same over the socket pair to a child process and, later, over a QUIC stream.
//!
//! ```text
//! offset  size  field
//!      0     1  magic 0x4D
//!      1     1  version
//!      2     1  kind
//!      3     1  codec of the hidden states in the payload
//!      4     2  flags
//!      6     2  stages that compute these rows from here on; 0: all that follow
//!      8     8  session
//!     16     4  epoch: counts the driver's rollbacks of a session
//!     20     4  position of the first row in the sequence
//!     24     4  rows
//!     28     4  payload length in bytes
//! ```
//!
//! Every field is checked before anything is allocated, and the payload buffer grows with what has really arrived.

use std::io::{self, Read, Write};

use crate::codec::Codec;

/// First byte of every frame.
pub const MAGIC: u8 = 0x4D;
/// Version of the frame layout.
pub const VERSION: u8 = 2;
/// Header size.
pub const HEADER_BYTES: usize = 32;
/// Largest payload: 4,096 rows of 16,384 f32.
pub const MAX_PAYLOAD_BYTES: u32 = 256 << 20;
/// Most rows in one frame.
pub const MAX_ROWS: u32 = 4096;
/// Most rows in one frame with [`FLAG_GUESS`].
pub const GUESS_ROWS_MAX: u32 = 16;
/// Most rows that one [`Kind::Next`] asks for.
pub const NEXT_ROWS_MAX: u32 = 64;

/// The driver wants a token sampled from the last row.
pub const FLAG_WANT_OUTPUT: u16 = 1;
/// The rows are prompt rows: their place in a batch follows the prefill rules (see the engine's scheduler).
pub const FLAG_PREFILL: u16 = 2;
/// On [`Kind::Close`]: forget the sequence instead of keeping it for prefix reuse.
pub const FLAG_FORGET: u16 = 4;
/// On [`Kind::Done`]: the account of rows whose hidden states go to the next stage, in a frame of their own.
pub const FLAG_HANDED_ON: u16 = 8;
/// On [`Kind::Close`]: drop queued work and keep the rest. The session is opened again under the epoch of this frame.
pub const FLAG_HOLD: u16 = 16;

/// On rows whose output is wanted: they are guesses. A row counts if its token is the one that was sampled for its place; a token
/// is wanted of each row that counts, and those behind one that does not are in vain.
pub const FLAG_GUESS: u16 = 32;

/// On [`Kind::Route`]: the driver compares the host with another that does the same, and is to hear of every step at once.
pub const FLAG_WATCHED: u16 = 128;

/// On [`Kind::RouteLost`]: nothing was on its way, as that way was never taken.
pub const FLAG_NEVER_TAKEN: u16 = 64;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $value:literal,)*) => {
        /// What a frame says.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Kind { $($(#[$doc])* $name = $value,)* }

        impl Kind {
            /// Every kind, for tests and fuzzing.
            pub const ALL: &'static [Kind] = &[$(Kind::$name,)*];

            fn parse(byte: u8) -> Option<Kind> {
                match byte { $($value => Some(Kind::$name),)* _ => None }
            }
        }
    };
}

kinds! {
    /// Driver to child, first frame: what to load. Payload: `stage::Load`.
    Load = 0x01,
    /// Loading progress. Payload: f32 fraction.
    Progress = 0x02,
    /// Ready. Payload: `stage::Loaded`.
    Loaded = 0x03,
    /// Could not load. Payload: UTF-8 message.
    LoadFailed = 0x04,
    /// Child to driver: it is at work and has nothing else to say. No payload.
    Alive = 0x05,
    /// A session begins, or goes on under a new epoch with what the stage holds of it. Payload: `stage::Open`.
    Open = 0x10,
    /// Admitted. Payload: `stage::Opened`.
    Opened = 0x11,
    /// Not admitted. Payload: `stage::NotOpened`.
    NotOpened = 0x12,
    /// The session ends; queued work is dropped.
    Close = 0x13,
    /// Driver to the host of a stage: where its hidden states go from now on. Payload: `stage::Route`.
    Route = 0x14,
    /// Driver to the host of a stage: the sessions that it has; all others are over. Payload: `stage::Sessions`.
    Sessions = 0x15,
    /// Host of a stage to its driver: what goes to this host does not arrive there any more. Payload: `stage::RouteTo`.
    RouteLost = 0x16,
    /// Rows as token ids. Payload: rows x i32.
    Tokens = 0x20,
    /// Rows as hidden states. Payload: rows x i32 token ids, then rows x n_embd values in `codec`.
    Hidden = 0x21,
    /// Sampled tokens. Payload: `stage::Step`.
    Sampled = 0x22,
    /// Rows were computed and no token was wanted, or they go on to the next stage. Payload: `stage::Step`.
    Done = 0x23,
    /// The rows could not be computed. Payload: UTF-8 message.
    StepFailed = 0x24,
    /// Rows as `Tokens`, one after the other and answered one by one, each with the token that this stage samples for its place. Sent
    /// before those tokens are known, so that a stage that is the whole model need not wait for the driver between two steps. What
    /// continues rows that are still to come is added to them.
    Next = 0x25,
    /// Driver to stage: to the next one once more the rows from `position` on, as they were kept. No payload. Answered by `Hidden`,
    /// or by `NotOpened` when they are not there after all.
    Repeat = 0x26,
    /// Driver to stage: the session goes on under the epoch of this frame, with what the stage holds of it; queued rows are in vain, and the
    /// position of the next says what to forget. No payload.
    Rewind = 0x27,
    /// Text to tokens. Payload: `stage::Tokenize`.
    Tokenize = 0x30,
    /// Answer to `Tokenize`. Payload: rows x i32.
    Tokenized = 0x31,
    /// Tokens to a pooled embedding. Payload: rows x i32.
    Embed = 0x32,
    /// Answer to `Embed`. Payload: n_embd x f32.
    Embedded = 0x33,
    /// Asks for a session's KV state.
    SaveState = 0x40,
    /// A session's KV state: the answer to `SaveState`, or, towards a stage, what to restore. Payload: opaque bytes.
    State = 0x41,
    /// The state was restored up to `position`.
    Restored = 0x42,
}

/// A frame's header, payload length excluded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What the frame says.
    pub kind: Kind,
    /// How hidden states in the payload are written.
    pub codec: Codec,
    /// `FLAG_*`.
    pub flags: u16,
    /// Which session.
    pub session: u64,
    /// Rollback count; frames of an older epoch are dropped on sight.
    pub epoch: u32,
    /// Position of the first row.
    pub position: u32,
    /// Number of rows.
    pub rows: u32,
    /// How many stages compute these rows from here on, the first of them included; the last of them answers with
    /// [`Kind::Done`]. 0: all that follow.
    pub stages: u16,
}

impl Header {
    /// A header with everything but the kind and the session at zero.
    pub fn new(kind: Kind, session: u64) -> Header {
        Header { kind, codec: Codec::F32, flags: 0, session, epoch: 0, position: 0, rows: 0, stages: 0 }
    }

    /// True when `flag` is set.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The header.
    pub header: Header,
    /// The payload; its meaning is the kind's.
    pub payload: Vec<u8>,
}

/// Why bytes are not a frame, or a frame not what its kind says.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream failed or ended inside a frame.
    #[error("the connection to the stage failed: {0}")]
    Io(#[from] io::Error),
    /// The bytes do not follow the layout.
    #[error("not a valid frame: {0}")]
    Malformed(&'static str),
    /// A payload that does not decode.
    #[error("the frame's payload does not decode: {0}")]
    Payload(#[from] postcard::Error),
}

impl Frame {
    /// A frame whose payload is a message in postcard encoding.
    pub fn message<T: serde::Serialize>(header: Header, message: &T) -> Result<Frame, FrameError> {
        Ok(Frame { header, payload: postcard::to_stdvec(message)? })
    }

    /// A frame of token rows.
    pub fn tokens(mut header: Header, tokens: &[i32]) -> Frame {
        header.rows = tokens.len() as u32;
        Frame { header, payload: bytemuck::cast_slice(tokens).to_vec() }
    }

    /// A frame whose payload is text.
    pub fn text(header: Header, text: &str) -> Frame {
        Frame { header, payload: text.as_bytes().to_vec() }
    }

    /// Decodes the payload as a message.
    pub fn decode<'a, T: serde::Deserialize<'a>>(&'a self) -> Result<T, FrameError> {
        Ok(postcard::from_bytes(&self.payload)?)
    }

    /// The payload as text, invalid bytes replaced.
    pub fn as_text(&self) -> String {
        String::from_utf8_lossy(&self.payload).into_owned()
    }

    /// The token ids of a [`Kind::Tokens`], [`Kind::Tokenized`], [`Kind::Embed`] or [`Kind::Hidden`] frame.
    pub fn token_rows(&self) -> Result<Vec<i32>, FrameError> {
        let bytes = self.header.rows as usize * 4;
        let ids = self.payload.get(..bytes).ok_or(FrameError::Malformed("fewer token ids than rows"))?;
        if self.header.kind != Kind::Hidden && self.payload.len() != bytes {
            return Err(FrameError::Malformed("payload length does not match the rows"));
        }
        Ok(bytemuck::pod_collect_to_vec(ids))
    }

    /// The hidden states of a [`Kind::Hidden`] frame, `[rows, n_embd]` row-major.
    pub fn hidden_rows(&self, n_embd: usize) -> Result<Vec<f32>, FrameError> {
        let rows = self.header.rows as usize;
        let expected = rows.checked_mul(4 + self.header.codec.row_bytes(n_embd));
        let values = if expected == Some(self.payload.len()) { self.payload.get(rows * 4..) } else { None };
        let decoded = values.and_then(|values| self.header.codec.decode(values, n_embd));
        decoded.ok_or(FrameError::Malformed("payload length does not match rows x n_embd"))
    }

    /// Writes header and payload.
    pub fn write_to(&self, out: &mut impl Write) -> Result<(), FrameError> {
        out.write_all(&self.header_bytes()?)?;
        out.write_all(&self.payload)?;
        Ok(())
    }

    /// Appends header and payload to `out`, so that several frames go out in one write.
    pub fn append_to(&self, out: &mut Vec<u8>) -> Result<(), FrameError> {
        out.extend_from_slice(&self.header_bytes()?);
        out.extend_from_slice(&self.payload);
        Ok(())
    }

    /// Whether it can be written.
    ///
    /// # Errors
    /// Its payload is too large.
    pub fn check(&self) -> Result<(), FrameError> {
        self.header_bytes().map(drop)
    }

    fn header_bytes(&self) -> Result<[u8; HEADER_BYTES], FrameError> {
        let length = u32::try_from(self.payload.len()).ok().filter(|&n| n <= MAX_PAYLOAD_BYTES);
        let length = length.ok_or(FrameError::Malformed("payload above the limit"))?;
        let h = &self.header;
        let mut out = [0u8; HEADER_BYTES];
        out[0] = MAGIC;
        out[1] = VERSION;
        out[2] = h.kind as u8;
        out[3] = h.codec as u8;
        out[4..6].copy_from_slice(&h.flags.to_le_bytes());
        out[6..8].copy_from_slice(&h.stages.to_le_bytes());
        out[8..16].copy_from_slice(&h.session.to_le_bytes());
        out[16..20].copy_from_slice(&h.epoch.to_le_bytes());
        out[20..24].copy_from_slice(&h.position.to_le_bytes());
        out[24..28].copy_from_slice(&h.rows.to_le_bytes());
        out[28..32].copy_from_slice(&length.to_le_bytes());
        Ok(out)
    }

    /// Bytes of the frame that begins with `bytes`; `Ok(None)` before its header is complete. To refuse it before it has come.
    pub fn length(bytes: &[u8]) -> Result<Option<usize>, FrameError> {
        let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        Ok(Some(HEADER_BYTES + parse_header(header)?.1 as usize))
    }

    /// The header of the frame that begins with `bytes`; `Ok(None)` before it is complete.
    pub fn header(bytes: &[u8]) -> Result<Option<Header>, FrameError> {
        let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        Ok(Some(parse_header(header)?.0))
    }

    /// Parses the frame at the beginning of `bytes`, and says how long it is; `Ok(None)` while it is incomplete.
    pub fn parse(bytes: &[u8]) -> Result<Option<(Frame, usize)>, FrameError> {
        let Some(header_bytes) = bytes.first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let (header, length) = parse_header(header_bytes)?;
        let end = HEADER_BYTES + length as usize;
        let Some(payload) = bytes.get(HEADER_BYTES..end) else { return Ok(None) };
        Ok(Some((Frame { header, payload: payload.to_vec() }, end)))
    }

    /// Reads one frame; `Ok(None)` at a clean end of the stream.
    pub fn read_from(input: &mut impl Read) -> Result<Option<Frame>, FrameError> {
        let mut bytes = [0u8; HEADER_BYTES];
        let mut filled = 0;
        while filled < HEADER_BYTES {
            match input.read(&mut bytes[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        let (header, length) = parse_header(&bytes)?;
        let mut payload = Vec::with_capacity((length as usize).min(READ_AHEAD_BYTES));
        input.by_ref().take(u64::from(length)).read_to_end(&mut payload)?;
        if payload.len() != length as usize {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Ok(Some(Frame { header, payload }))
    }
}

/// How much is allocated on the word of a header alone.
const READ_AHEAD_BYTES: usize = 1 << 20;

fn parse_header(bytes: &[u8; HEADER_BYTES]) -> Result<(Header, u32), FrameError> {
    let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    if bytes[0] != MAGIC {
        return Err(FrameError::Malformed("wrong magic byte"));
    }
    if bytes[1] != VERSION {
        return Err(FrameError::Malformed("unknown frame version"));
    }
    let kind = Kind::parse(bytes[2]).ok_or(FrameError::Malformed("unknown kind"))?;
    let codec = Codec::parse(bytes[3]).ok_or(FrameError::Malformed("unknown codec"))?;
    let rows = u32_at(24);
    // Tokenized text may be longer than any batch: it is bounded by its payload instead.
    if rows > MAX_ROWS && !matches!(kind, Kind::Tokenized | Kind::Embed) {
        return Err(FrameError::Malformed("too many rows"));
    }
    let length = u32_at(28);
    if length > MAX_PAYLOAD_BYTES {
        return Err(FrameError::Malformed("payload above the limit"));
    }
    let session = u64::from(u32_at(8)) | u64::from(u32_at(12)) << 32;
    let (flags, stages, epoch, position) = (u16_at(4), u16_at(6), u32_at(16), u32_at(20));
    Ok((Header { kind, codec, flags, session, epoch, position, rows, stages }, length))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mesh::{NodeId, RingId};
    use crate::stage;

    fn any_frame() -> impl Strategy<Value = Frame> {
        (
            proptest::sample::select(Kind::ALL),
            proptest::sample::select(Codec::ALL.as_slice()),
            any::<(u16, u64, u32, u32, u16)>(),
            0..=MAX_ROWS,
            proptest::collection::vec(any::<u8>(), 0..600),
        )
            .prop_map(|(kind, codec, (flags, session, epoch, position, stages), rows, payload)| Frame {
                header: Header { kind, codec, flags, session, epoch, position, rows, stages },
                payload,
            })
    }

    proptest! {
        #[test]
        fn a_frame_survives_the_wire(frames in proptest::collection::vec(any_frame(), 1..5)) {
            let mut wire = Vec::new();
            for frame in &frames {
                frame.append_to(&mut wire).unwrap();
            }
            let (first, length) = Frame::parse(&wire).unwrap().unwrap();
            prop_assert_eq!(&first, &frames[0]);
            prop_assert!(Frame::parse(&wire[..length - 1]).unwrap().is_none());
            let mut input = wire.as_slice();
            for frame in &frames {
                prop_assert_eq!(&Frame::read_from(&mut input).unwrap().unwrap(), frame);
            }
            prop_assert!(Frame::read_from(&mut input).unwrap().is_none());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Frame::read_from(&mut bytes.as_slice());
            let _ = Frame::parse(&bytes);
        }

        #[test]
        fn arbitrary_payloads_never_panic(frame in any_frame(), width in 0usize..300) {
            let _ = (frame.token_rows(), frame.hidden_rows(width), frame.as_text());
            let _ = (frame.decode::<stage::Load>(), frame.decode::<stage::Open>(), frame.decode::<stage::Step>());
            let _ = (frame.decode::<stage::Loaded>(), frame.decode::<stage::NotOpened>(), frame.decode::<stage::Route>());
            let _ = (frame.decode::<stage::Opened>(), frame.decode::<stage::Sessions>(), frame.decode::<stage::RouteTo>());
        }

        #[test]
        fn a_damaged_frame_is_an_error_or_another_frame(frame in any_frame(), at in 0usize..32, bit in 0u8..8) {
            let mut wire = Vec::new();
            frame.append_to(&mut wire).unwrap();
            wire[at] ^= 1 << bit;
            if let Ok(Some(read)) = Frame::read_from(&mut wire.as_slice()) {
                prop_assert_ne!(read, frame);
            }
        }
    }

    #[test]
    fn a_lying_length_does_not_allocate_what_it_claims() {
        let mut wire = Vec::new();
        Frame::text(Header::new(Kind::StepFailed, 7), "x").append_to(&mut wire).unwrap();
        wire[28..32].copy_from_slice(&MAX_PAYLOAD_BYTES.to_le_bytes());
        assert!(matches!(Frame::read_from(&mut wire.as_slice()), Err(FrameError::Io(_))));
        wire[28..32].copy_from_slice(&(MAX_PAYLOAD_BYTES + 1).to_le_bytes());
        assert!(matches!(Frame::read_from(&mut wire.as_slice()), Err(FrameError::Malformed(_))));
    }

    #[test]
    fn the_encoding_of_a_route_is_pinned() {
        let to = stage::RouteTo { node: NodeId::from_bytes([0xab; 32]), ring: RingId::from_bytes([0xcd; 16]) };
        let place = format!("@{}\x20{}", "ab".repeat(32), "cd".repeat(16));
        for (route, payload) in [
            (stage::Route::default(), "\x00\x00\x00".to_owned()),
            (stage::Route { next: Some(to), ..stage::Route::default() }, format!("\x01{place}\x00\x00")),
            (stage::Route { next: None, standby: Some(to), is_standby: true }, format!("\x00\x01{place}\x01")),
        ] {
            let frame = Frame::message(Header::new(Kind::Route, 0), &route).unwrap();
            assert_eq!((frame.header_bytes().unwrap()[2], frame.as_text()), (0x14, payload));
            assert_eq!(frame.decode::<stage::Route>().unwrap(), route);
        }
        let lost = Frame::message(Header::new(Kind::RouteLost, 0), &to).unwrap();
        assert_eq!((lost.header_bytes().unwrap()[2], lost.as_text()), (0x16, place));
    }

    #[test]
    fn the_encoding_of_a_list_of_sessions_is_pinned() {
        let sessions = stage::Sessions { open: vec![1, 300] };
        let frame = Frame::message(Header::new(Kind::Sessions, 0), &sessions).unwrap();
        assert_eq!((frame.header_bytes().unwrap()[2], frame.payload.as_slice()), (0x15, &[2, 1, 0xac, 2][..]));
        assert_eq!(frame.decode::<stage::Sessions>().unwrap(), sessions);
    }

    #[test]
    fn what_replays_kept_rows_is_pinned() {
        let mut header = Header::new(Kind::Repeat, 7);
        (header.epoch, header.position, header.rows, header.stages) = (2, 256, 64, 0x0102);
        let repeat = Frame { header, payload: vec![] }.header_bytes().unwrap();
        assert_eq!(repeat[2..8], [0x26, 0, 0, 0, 2, 1]);
        assert_eq!(repeat[8..], [7, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 1, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0]);
        let opened = stage::Opened { cached_tokens: 300, kept_tokens: 5 };
        assert_eq!(Frame::message(header, &opened).unwrap().payload, [0xac, 2, 5]);
    }

    #[test]
    fn the_layout_is_pinned() {
        let mut header = Header::new(Kind::Tokens, 0x0102_0304_0506_0708);
        (header.flags, header.epoch, header.position) = (FLAG_WANT_OUTPUT, 3, 500);
        let mut wire = Vec::new();
        Frame::tokens(header, &[1, -1]).append_to(&mut wire).unwrap();
        let hex: String = wire.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            hex,
            "4d022000010000000807060504030201\
                         03000000f401000002000000080000000100 0000ffffffff"
                .replace(' ', "")
        );
    }
}
