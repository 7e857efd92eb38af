//! A ticket as a QR code, for a camera on another machine.

use qrcode::{EcLevel, QrCode, render::unicode::Dense1x2};

/// The code in half blocks, light on dark as terminals are; `None`: the text is too long for one.
///
/// Tickets are read in upper case too, and codes of upper case are smaller: two characters take 11 bits instead of 16.
pub(crate) fn code(ticket: &str) -> Option<String> {
    // A screen does not tear or fade: the lowest redundancy gives the smallest code.
    let code = QrCode::with_error_correction_level(ticket.to_ascii_uppercase(), EcLevel::L).ok()?;
    Some(code.render::<Dense1x2>().dark_color(Dense1x2::Light).light_color(Dense1x2::Dark).build())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_tickets_fit_a_terminal_and_what_is_longer_is_left_out() {
        let ticket = format!("murmur1{}", "a2".repeat(400));
        let code = code(&ticket).unwrap();
        let width = code.lines().map(|line| line.chars().count()).max().unwrap();
        assert!((60..=120).contains(&width), "{width}");
        assert!(code.lines().all(|line| line.chars().count() == width));
        assert_eq!(super::code(&"a".repeat(10_000)), None);
    }
}
