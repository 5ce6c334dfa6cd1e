//! The servers of one role: who gets the next request, and who waits. Owns membership, the queue
//! and the leases; does not know what a request is, only its work and its prefix.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::affinity::{Affinity, PrefixKey};
use crate::health::Standing;
use crate::instance::{Instance, Role};
use crate::routing::{Candidate, Routing, least_outstanding, round_robin};

/// A server that saw the prefix gets the request unless it has this many times the least work...
const AFFINITY_OVERLOAD_FACTOR: u64 = 2;
/// ...plus this many requests like it.
const AFFINITY_OVERLOAD_REQUESTS: u64 = 4;

/// Limits of a pool.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests in flight a server; 0: no limit.
    pub outstanding_max: u64,
    /// Requests that wait for a server.
    pub queue_depth: usize,
    /// How long one waits.
    pub queue_timeout: Duration,
}

/// What routing is told of a request.
#[derive(Clone, Default)]
pub struct Hint {
    /// Work it makes, in the unit of the pool; at least 1.
    pub work: u64,
    /// Its prompt's prefix.
    pub prefix: PrefixKey,
    /// Servers that failed it already.
    pub excluded: Vec<u64>,
}

/// Why there is no server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// None is left that could be asked.
    NoServer,
    /// All are at their limit and the queue is full.
    QueueFull,
    /// All stayed at their limit for too long.
    QueueTimeout,
}

struct Member {
    instance: Arc<Instance>,
    credit: f64,
}

struct Waiter {
    hint: Hint,
    grant: oneshot::Sender<Lease>,
}

#[derive(Default)]
struct State {
    members: Vec<Member>,
    waiters: VecDeque<Waiter>,
    affinity: Affinity,
    turn: usize,
}

impl State {
    /// Whether the queue is full of clients that are still there.
    fn is_full(&mut self, depth: usize) -> bool {
        if self.waiters.len() >= depth {
            self.waiters.retain(|waiter| !waiter.grant.is_closed());
        }
        self.waiters.len() >= depth
    }
}

enum Choice {
    Chosen(usize),
    Busy,
    Nobody,
}

/// The servers of one role.
pub struct Pool {
    /// Their role.
    pub role: Role,
    /// Requests turned away because the queue was full or slow.
    pub overflows: AtomicU64,
    routing: Mutex<Routing>,
    limits: Limits,
    state: Mutex<State>,
}

/// The right to send one request to one server; gives it back when dropped.
pub struct Lease {
    /// The server.
    pub instance: Arc<Instance>,
    pool: Arc<Pool>,
    work: u64,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.instance.give_back(self.work);
        self.pool.grant_waiters();
    }
}

impl Pool {
    /// An empty pool.
    pub fn new(role: Role, routing: Routing, limits: Limits) -> Self {
        let state = Mutex::default();
        Self { role, overflows: AtomicU64::new(0), routing: Mutex::new(routing), limits, state }
    }

    /// A server for a request, waiting for one when all are at their limit.
    pub async fn acquire(self: &Arc<Self>, hint: Hint) -> Result<Lease, Refusal> {
        let granted = {
            let mut state = self.locked();
            // Those who wait come first; a newcomer does not overtake them.
            let choice = if state.waiters.is_empty() {
                self.choose(&mut state, &hint)
            } else {
                Choice::Busy
            };
            match choice {
                Choice::Chosen(index) => return Ok(self.lease(&mut state, index, &hint)),
                Choice::Nobody => return Err(Refusal::NoServer),
                Choice::Busy if state.is_full(self.limits.queue_depth) => {
                    self.overflows.fetch_add(1, Relaxed);
                    return Err(Refusal::QueueFull);
                }
                Choice::Busy => {}
            }
            let (grant, granted) = oneshot::channel();
            state.waiters.push_back(Waiter { hint, grant });
            granted
        };
        // Those before may wait for one server only, while another one is free for this request.
        self.grant_waiters();
        match tokio::time::timeout(self.limits.queue_timeout, granted).await {
            Ok(Ok(lease)) => Ok(lease),
            Ok(Err(_)) => Err(Refusal::NoServer),
            Err(_) => {
                self.overflows.fetch_add(1, Relaxed);
                Err(Refusal::QueueTimeout)
            }
        }
    }

    /// Whether a newcomer would be turned away now.
    pub fn is_full(&self) -> bool {
        let mut state = self.locked();
        !state.waiters.is_empty() && state.is_full(self.limits.queue_depth)
    }

    /// Gives free places to those who wait. Called when a place may have become free: a lease
    /// ended, a server came, came back or left.
    pub fn grant_waiters(self: &Arc<Self>) {
        let mut unwanted = Vec::new();
        {
            let mut state = self.locked();
            let mut index = 0;
            while index < state.waiters.len() {
                if state.waiters[index].grant.is_closed() {
                    state.waiters.remove(index);
                    continue;
                }
                let hint = state.waiters[index].hint.clone();
                match self.choose(&mut state, &hint) {
                    Choice::Chosen(member) => {
                        let lease = self.lease(&mut state, member, &hint);
                        let waiter = state.waiters.remove(index).expect("index is in range");
                        // A refused lease is dropped outside the lock: its drop takes it.
                        unwanted.extend(waiter.grant.send(lease).err());
                    }
                    // Dropping the sender tells the waiter that there is nobody.
                    Choice::Nobody => drop(state.waiters.remove(index)),
                    // Without exclusions nobody behind can be served either.
                    Choice::Busy if hint.excluded.is_empty() => break,
                    Choice::Busy => index += 1,
                }
            }
        }
        drop(unwanted);
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        let state = self.locked();
        state.waiters.iter().filter(|waiter| !waiter.grant.is_closed()).count()
    }

    /// The servers now.
    pub fn members(&self) -> Vec<Arc<Instance>> {
        self.locked().members.iter().map(|member| member.instance.clone()).collect()
    }

    /// Adds a server; false when its address is there already.
    pub fn add(self: &Arc<Self>, instance: Arc<Instance>) -> bool {
        {
            let mut state = self.locked();
            if state.members.iter().any(|member| member.instance.address == instance.address) {
                return false;
            }
            state.members.push(Member { instance, credit: 0.0 });
        }
        self.grant_waiters();
        true
    }

    /// Takes a server out of the pool. Requests in flight finish.
    pub fn remove(self: &Arc<Self>, name: &str) -> Option<Arc<Instance>> {
        let removed = {
            let mut state = self.locked();
            let index = state.members.iter().position(|member| member.instance.name == name)?;
            state.members.remove(index).instance
        };
        removed.set_removed();
        self.grant_waiters();
        Some(removed)
    }

    /// The policy.
    pub fn routing(&self) -> Routing {
        *self.routing.lock().expect("no panic while held")
    }

    /// Changes the policy.
    pub fn set_routing(&self, routing: Routing) {
        *self.routing.lock().expect("no panic while held") = routing;
    }

    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    fn lease(self: &Arc<Self>, state: &mut State, index: usize, hint: &Hint) -> Lease {
        let instance = state.members[index].instance.clone();
        instance.take(hint.work);
        if self.routing() == Routing::PrefixAffinity {
            state.affinity.note(&hint.prefix, instance.id);
        }
        Lease { instance, pool: self.clone(), work: hint.work }
    }

    /// The best usable server; when there is none, one that is only ejected, for a server that
    /// failed may still be better than no answer.
    fn choose(&self, state: &mut State, hint: &Hint) -> Choice {
        let standings: Vec<_> =
            state.members.iter().map(|member| member.instance.standing()).collect();
        let open = |index: &usize| {
            let instance = &state.members[*index].instance;
            !instance.is_draining() && !hint.excluded.contains(&instance.id)
        };
        let open: Vec<usize> = (0..state.members.len()).filter(open).collect();
        let usable = |index: &usize| matches!(standings[*index], Standing::Usable(_));
        let mut indexes: Vec<usize> = open.iter().copied().filter(usable).collect();
        if indexes.is_empty() {
            indexes = open;
            indexes.retain(|index| standings[*index] == Standing::Ejected);
        }
        if indexes.is_empty() {
            return Choice::Nobody;
        }
        let limit = self.limits.outstanding_max;
        indexes.retain(|index| limit == 0 || state.members[*index].instance.outstanding() < limit);
        let weight = |index: usize| match standings[index] {
            Standing::Usable(weight) => weight,
            Standing::Ejected | Standing::Down => 1.0,
        };
        let mut candidates: Vec<_> = indexes
            .iter()
            .map(|index| Candidate {
                load: state.members[*index].instance.outstanding_work(),
                weight: weight(*index),
                credit: state.members[*index].credit,
            })
            .collect();
        match self.pick(state, hint, &indexes, &mut candidates) {
            Some(picked) => Choice::Chosen(indexes[picked]),
            None => Choice::Busy,
        }
    }

    fn pick(
        &self,
        state: &mut State,
        hint: &Hint,
        indexes: &[usize],
        candidates: &mut [Candidate],
    ) -> Option<usize> {
        state.turn = state.turn.wrapping_add(1);
        match self.routing() {
            Routing::RoundRobin => {
                let picked = round_robin(candidates);
                for (index, candidate) in indexes.iter().zip(candidates) {
                    state.members[*index].credit = candidate.credit;
                }
                picked
            }
            Routing::LeastOutstanding => least_outstanding(candidates, hint.work, state.turn),
            Routing::PrefixAffinity => affine(state, hint, indexes, candidates)
                .or_else(|| least_outstanding(candidates, hint.work, state.turn)),
        }
    }
}

/// The server that saw the longest prefix, unless it has far more to do than the idlest.
fn affine(
    state: &State,
    hint: &Hint,
    indexes: &[usize],
    candidates: &[Candidate],
) -> Option<usize> {
    let least = candidates.iter().map(|candidate| candidate.load).min()?;
    let limit = AFFINITY_OVERLOAD_FACTOR * least + AFFINITY_OVERLOAD_REQUESTS * hint.work;
    state.affinity.seen_by(&hint.prefix).find_map(|server| {
        let has_id = |index: &usize| state.members[*index].instance.id == server;
        let picked = indexes.iter().position(has_id)?;
        (candidates[picked].load <= limit).then_some(picked)
    })
}
