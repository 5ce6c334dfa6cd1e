//! How one of several servers is chosen. Owns the comparison; does not know health, queues or
//! requests, only candidates with a load and a weight.

use serde::Deserialize;

/// Which server gets a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Routing {
    /// In turn.
    #[value(alias = "round_robin")]
    RoundRobin,
    /// The one with the least outstanding work: prompt bytes for prefill, requests for decode.
    #[default]
    #[value(alias = "least_outstanding")]
    LeastOutstanding,
    /// The prefiller that saw the longest part of this prompt before; others by least outstanding.
    #[value(alias = "prefix_affinity")]
    PrefixAffinity,
}

/// A server that may be chosen.
pub struct Candidate {
    /// Outstanding work, in the unit of its pool.
    pub load: u64,
    /// Share of traffic it should get: 1, less while it returns from an ejection.
    pub weight: f64,
    /// Round-robin credit, kept by the pool between choices.
    pub credit: f64,
}

/// Index of the candidate with the least work after taking `work` more, relative to its weight.
/// Among equals the first at or after `turn` wins, so that idle servers share.
pub fn least_outstanding(candidates: &[Candidate], work: u64, turn: usize) -> Option<usize> {
    let count = candidates.len();
    let score = |index: usize| (candidates[index].load + work) as f64 / candidates[index].weight;
    let order = (0..count).map(|step| (turn + step) % count);
    order.min_by(|a, b| score(*a).total_cmp(&score(*b)))
}

/// Smooth weighted round robin: everybody earns its weight, the richest pays the sum and serves.
/// With equal weights this is plain turns; a server with weight 0.1 gets a tenth of a share.
pub fn round_robin(candidates: &mut [Candidate]) -> Option<usize> {
    let total: f64 = candidates.iter().map(|candidate| candidate.weight).sum();
    for candidate in candidates.iter_mut() {
        candidate.credit += candidate.weight;
    }
    // max_by keeps the last of equals; reversed, so that the first serves first.
    let order = (0..candidates.len()).rev();
    let chosen = order.max_by(|a, b| candidates[*a].credit.total_cmp(&candidates[*b].credit))?;
    candidates[chosen].credit -= total;
    Some(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(load: u64, weight: f64) -> Candidate {
        Candidate { load, weight, credit: 0.0 }
    }

    #[test]
    fn round_robin_takes_turns_and_honours_weights() {
        // Goal: equal servers strictly in turn; a returning one gets its small share, evenly.
        let mut equal = [candidate(0, 1.0), candidate(9, 1.0), candidate(0, 1.0)];
        let turns: Vec<_> = (0..6).map(|_| round_robin(&mut equal).unwrap()).collect();
        assert_eq!(turns, [0, 1, 2, 0, 1, 2]);
        let mut returning = [candidate(0, 1.0), candidate(0, 0.25)];
        let chosen = (0..50).filter(|_| round_robin(&mut returning) == Some(1)).count();
        assert_eq!(chosen, 10);
        assert_eq!(round_robin(&mut []), None);
    }

    #[test]
    fn least_outstanding_weighs_load_and_breaks_ties_in_turn() {
        // Goal: less work wins, a low weight counts as more work, equals alternate.
        let by_load = [candidate(5, 1.0), candidate(2, 1.0), candidate(4, 1.0)];
        assert_eq!(least_outstanding(&by_load, 1, 0), Some(1));
        let returning = [candidate(3, 1.0), candidate(0, 0.1)];
        assert_eq!(least_outstanding(&returning, 1, 1), Some(0));
        let equal = [candidate(0, 1.0), candidate(0, 1.0)];
        assert_eq!(least_outstanding(&equal, 1, 4), Some(0));
        assert_eq!(least_outstanding(&equal, 1, 5), Some(1));
        assert_eq!(least_outstanding(&[], 1, 0), None);
    }
}
