//! Whether one server may get requests, from probes (active) and from what requests met
//! (passive). Owns the state machine and its times; does no I/O.
//!
//! - Up: gets its share.
//! - Ejected: requests failed `eject_after` times in a row. Out for `eject_base`, doubled at each
//!   ejection in a row up to [`EJECT_MAX`]. Then returning.
//! - Down: probes failed [`FALL`] times in a row. Out until [`RISE`] succeed. Then returning.
//! - Returning: its share grows from a tenth to the whole over `slow_return`; a failure ejects it
//!   at once, so that a server that fails everything takes few requests with it.

use std::time::{Duration, Instant};

/// Failed probes in a row until a server counts as down.
const FALL: u32 = 3;
/// Successful probes in a row until it counts as up again.
const RISE: u32 = 2;
/// The longest ejection.
pub const EJECT_MAX: Duration = Duration::from_secs(60);
/// The share of a server that has just come back.
const WEIGHT_MIN: f64 = 0.1;

/// Times and counts of the state machine.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Failed requests in a row until ejection; 0: never.
    pub eject_after: u32,
    /// Length of the first ejection.
    pub eject_base: Duration,
    /// Time until a server that came back has its whole share.
    pub slow_return: Duration,
}

/// What routing needs to know.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Standing {
    /// May be chosen, with this weight.
    Usable(f64),
    /// Out by its failures; may be tried when nobody else is left.
    Ejected,
    /// Probes say it is dead.
    Down,
}

/// State of one server.
#[derive(Debug, Default)]
pub struct Health {
    down: bool,
    probes_failed: u32,
    probes_passed: u32,
    requests_failed: u32,
    ejections: u32,
    ejected_until: Option<Instant>,
    returned_at: Option<Instant>,
}

/// A change that is worth a line in the log.
#[derive(Debug, PartialEq)]
pub enum Change {
    /// Out for this long after so many failures.
    Ejected(Duration, u32),
    /// Probes failed.
    WentDown,
    /// Probes succeed again.
    CameUp,
}

impl Health {
    /// The standing at `now`.
    pub fn standing(&self, rules: &Rules, now: Instant) -> Standing {
        if self.down {
            return Standing::Down;
        }
        if self.ejected_until.is_some_and(|until| now < until) {
            return Standing::Ejected;
        }
        let Some(returned) = self.returned_at else { return Standing::Usable(1.0) };
        let elapsed = now.saturating_duration_since(returned).as_secs_f64();
        let whole = rules.slow_return.as_secs_f64();
        let share = if whole > 0.0 { elapsed / whole } else { 1.0 };
        Standing::Usable(share.clamp(WEIGHT_MIN, 1.0))
    }

    /// A request was answered.
    pub fn request_passed(&mut self, rules: &Rules, now: Instant) {
        self.requests_failed = 0;
        if self.standing(rules, now) == Standing::Usable(1.0) {
            self.ejections = 0;
        }
    }

    /// A request found the server dead, hanging or refusing.
    pub fn request_failed(&mut self, rules: &Rules, now: Instant) -> Option<Change> {
        self.requests_failed += 1;
        let returning = matches!(self.standing(rules, now), Standing::Usable(w) if w < 1.0);
        let enough = self.requests_failed >= rules.eject_after || returning;
        if rules.eject_after == 0 || !enough || self.standing(rules, now) == Standing::Ejected {
            return None;
        }
        let failed = std::mem::take(&mut self.requests_failed);
        let doubled = rules.eject_base.saturating_mul(1 << self.ejections.min(16));
        let length = doubled.min(EJECT_MAX.max(rules.eject_base));
        self.ejections += 1;
        self.ejected_until = Some(now + length);
        self.returned_at = Some(now + length);
        Some(Change::Ejected(length, failed))
    }

    /// A probe was answered, or not.
    pub fn probed(&mut self, alive: bool, now: Instant) -> Option<Change> {
        if alive {
            self.probes_failed = 0;
            self.probes_passed = self.probes_passed.saturating_add(1);
        } else {
            self.probes_passed = 0;
            self.probes_failed = self.probes_failed.saturating_add(1);
        }
        match self.down {
            false if self.probes_failed >= FALL => {
                self.down = true;
                Some(Change::WentDown)
            }
            true if self.probes_passed >= RISE => {
                self.down = false;
                self.requests_failed = 0;
                self.ejected_until = None;
                self.returned_at = Some(now);
                Some(Change::CameUp)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules {
        eject_after: 3,
        eject_base: Duration::from_secs(5),
        slow_return: Duration::from_secs(30),
    };

    #[test]
    fn failures_eject_and_the_return_is_slow() {
        // Goal: three failures in a row eject, a success between resets, the share grows from 0.1,
        // one failure while returning ejects again for twice as long.
        let (mut health, start) = (Health::default(), Instant::now());
        health.request_failed(&RULES, start);
        health.request_failed(&RULES, start);
        health.request_passed(&RULES, start);
        assert_eq!(health.request_failed(&RULES, start), None);
        assert_eq!(health.request_failed(&RULES, start), None);
        let ejected = health.request_failed(&RULES, start);
        assert_eq!(ejected, Some(Change::Ejected(Duration::from_secs(5), 3)));
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(health.standing(&RULES, at(4)), Standing::Ejected);
        assert_eq!(health.standing(&RULES, at(5)), Standing::Usable(WEIGHT_MIN));
        assert_eq!(health.standing(&RULES, at(20)), Standing::Usable(0.5));
        let again = health.request_failed(&RULES, at(20));
        assert_eq!(again, Some(Change::Ejected(Duration::from_secs(10), 1)));
        assert_eq!(health.standing(&RULES, at(60)), Standing::Usable(1.0));
        health.request_passed(&RULES, at(61));
        assert_eq!(health.ejections, 0);
    }

    #[test]
    fn probes_take_a_server_down_and_back() {
        // Goal: FALL failures in a row, RISE successes in a row, then a slow return.
        let (mut health, now) = (Health::default(), Instant::now());
        let probes = [false, false, true, false, false, false, true, false, true, true];
        let changes: Vec<_> =
            probes.iter().filter_map(|alive| health.probed(*alive, now)).collect();
        assert_eq!(changes, [Change::WentDown, Change::CameUp]);
        assert_eq!(health.standing(&RULES, now), Standing::Usable(WEIGHT_MIN));
    }
}
