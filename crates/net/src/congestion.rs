//! Congestion control of a node's connections: CUBIC (RFC 9438), and bursts.
//!
//! Rows that a ring sends together are waited for together. noq lets ten packets go at once and spreads what is more over the round trip, at
//! 1.25 windows for each (RFC 9002, section 7.7). Eight rows of 8 KiB took 12 ms longer for it than one, on a way of 30 ms that was idle
//! otherwise. So what is in flight up to a bound leaves at once, as far as the congestion window allows: TCP mostly does so with its whole
//! window. A file that is sent for longer has more in flight than that, and is paced as ever; a loss makes the window smaller for both.

use std::{
    any::Any,
    sync::Arc,
    time::{Duration, Instant},
};

use iroh::endpoint::{Controller, ControllerFactory, ControllerMetrics, RttEstimator};
use noq_proto::congestion::CubicConfig;

/// With less in flight nothing is paced: eight rows of 4,096 f32.
const BURST_BYTES: u64 = 128 << 10;
/// noq lets go at once what the rate that it is told comes to in so long, us.
const BURST_US: u64 = 2_000;
/// The rate that it is told for that, bytes per second.
const BURST_RATE: u64 = BURST_BYTES * 1_000_000 / BURST_US;
/// The congestion window that a connection begins with: 32 packets, so that a first short prompt needs few round trips. RFC 6928 has ten;
/// content networks were measured to begin with many more (Rüth and Hohlfeld, 2018).
const FIRST_WINDOW_BYTES: u64 = 32 * 1200;

/// Makes the controllers of connections.
pub(crate) struct Bursts(Arc<CubicConfig>);

impl Default for Bursts {
    fn default() -> Self {
        let mut cubic = CubicConfig::default();
        cubic.initial_window(FIRST_WINDOW_BYTES);
        Bursts(Arc::new(cubic))
    }
}

impl ControllerFactory for Bursts {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Bursting { cubic: Arc::clone(&self.0).build(now, current_mtu), in_flight_bytes: 0 })
    }
}

/// CUBIC, and what is in flight.
#[derive(Debug)]
struct Bursting {
    cubic: Box<dyn Controller>,
    /// Of packets that are to be acknowledged.
    in_flight_bytes: u64,
}

impl Controller for Bursting {
    fn on_sent(&mut self, now: Instant, bytes: u64, largest_pn: u64) {
        self.cubic.on_sent(now, bytes, largest_pn);
    }

    fn on_packet_sent(&mut self, now: Instant, bytes: u16, pn: u64) {
        self.in_flight_bytes += u64::from(bytes);
        self.cubic.on_packet_sent(now, bytes, pn);
    }

    fn on_cwnd_limited(&mut self) {
        self.cubic.on_cwnd_limited();
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, pn: u64, app_limited: bool, rtt: &RttEstimator) {
        self.in_flight_bytes = self.in_flight_bytes.saturating_sub(bytes);
        self.cubic.on_ack(now, sent, bytes, pn, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest_packet_num_acked: Option<u64>) {
        // Packets that are given up without a word, as those of a handshake, are seen here only.
        self.in_flight_bytes = in_flight;
        self.cubic.on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        is_ecn: bool,
        lost_bytes: u64,
        largest_lost_pn: u64,
    ) {
        self.cubic.on_congestion_event(now, sent, is_persistent_congestion, is_ecn, lost_bytes, largest_lost_pn);
    }

    fn on_packet_lost(&mut self, lost_bytes: u16, pn: u64, now: Instant) {
        self.in_flight_bytes = self.in_flight_bytes.saturating_sub(u64::from(lost_bytes));
        self.cubic.on_packet_lost(lost_bytes, pn, now);
    }

    fn on_spurious_congestion_event(&mut self) {
        self.cubic.on_spurious_congestion_event();
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.cubic.on_mtu_update(new_mtu);
    }

    fn on_ack_frequency_update(&mut self, ack_eliciting_threshold: u64, requested_max_ack_delay: Duration) {
        self.cubic.on_ack_frequency_update(ack_eliciting_threshold, requested_max_ack_delay);
    }

    fn window(&self) -> u64 {
        self.cubic.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        let mut metrics = self.cubic.metrics();
        if self.in_flight_bytes < BURST_BYTES {
            metrics.pacing_rate = Some(BURST_RATE);
        }
        metrics
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Bursting { cubic: self.cubic.clone_box(), in_flight_bytes: self.in_flight_bytes })
    }

    fn initial_window(&self) -> u64 {
        self.cubic.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKET_BYTES: u16 = 1200;

    fn build(factory: impl ControllerFactory) -> Box<dyn Controller> {
        Arc::new(factory).build(Instant::now(), PACKET_BYTES)
    }

    /// Sends so many bytes; the number of packets.
    fn send(controller: &mut dyn Controller, bytes: u64) -> u64 {
        let packets = bytes.div_ceil(u64::from(PACKET_BYTES));
        (0..packets).for_each(|pn| controller.on_packet_sent(Instant::now(), PACKET_BYTES, pn));
        packets
    }

    #[test]
    fn rows_that_are_sent_together_leave_at_once_and_what_is_sent_for_longer_is_paced() {
        let mut controller = build(Bursts::default());
        let at_once =
            |controller: &dyn Controller| controller.metrics().pacing_rate.map(|rate| rate * BURST_US / 1_000_000);
        assert_eq!(at_once(&*controller), Some(BURST_BYTES));
        send(&mut *controller, 64 << 10);
        assert_eq!(at_once(&*controller), Some(BURST_BYTES));
        let packets = send(&mut *controller, 64 << 10);
        assert_eq!(at_once(&*controller), None);
        // When they have arrived, as many may go again, however long nothing was sent.
        controller.on_end_acks(Instant::now(), 0, true, Some(packets));
        assert_eq!(at_once(&*controller), Some(BURST_BYTES));
    }

    #[test]
    fn packets_that_are_lost_are_not_in_flight() {
        let mut controller = build(Bursts::default());
        let packets = send(&mut *controller, BURST_BYTES);
        assert_eq!(controller.metrics().pacing_rate, None);
        (0..packets).for_each(|pn| controller.on_packet_lost(PACKET_BYTES, pn, Instant::now()));
        assert_eq!(controller.metrics().pacing_rate, Some(BURST_RATE));
    }

    #[test]
    fn how_much_may_be_in_flight_is_for_cubic_to_say_and_a_loss_is_heeded() {
        let begun = Instant::now();
        let mut config = CubicConfig::default();
        config.initial_window(FIRST_WINDOW_BYTES);
        let (mut bursting, mut cubic) = (build(Bursts::default()), build(config));
        assert_eq!(bursting.window(), FIRST_WINDOW_BYTES);
        for loss in 1..=5 {
            let at = begun + Duration::from_secs(loss);
            for controller in [&mut bursting, &mut cubic] {
                send(&mut **controller, BURST_BYTES);
                controller.on_congestion_event(at, at, loss == 5, false, PACKET_BYTES.into(), loss);
            }
            assert_eq!(bursting.window(), cubic.window());
            assert!(bursting.window() < FIRST_WINDOW_BYTES);
        }
        assert_eq!(bursting.window(), 2 * u64::from(PACKET_BYTES));
    }
}
