//! All nodes together: their summaries, read from the store and combined.

use super::figures::WindowSet;
use super::summary::{JobGauges, LimitLevel, NodeGauges, NodeSummary, RowGauges};
use crate::backend::StoredSummary;
use crate::limiter::NEAR_LIMITS_MAX;
use crate::model::{NodeId, UnixMs};
use serde::Serialize;
use std::sync::Arc;
use std::time::Duration;

/// The overview of the fleet, as JSON shows it.
#[derive(Debug, PartialEq, Serialize)]
pub struct FleetOverview {
    pub at: UnixMs,
    /// Every node with a lease is in it.
    pub complete: bool,
    pub nodes: Vec<NodeOverview>,
    pub fleet: FleetFigures,
}

/// One node.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeOverview {
    pub id: String,
    pub version: String,
    pub started_at: UnixMs,
    pub uptime_s: u64,
    pub phase: String,
    /// The age of its summary, in milliseconds, by the clock of the store.
    pub age_ms: u64,
    #[serde(flatten)]
    pub gauges: NodeGauges,
    pub windows: WindowSet,
}

/// All nodes together.
#[derive(Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FleetFigures {
    /// The number of nodes.
    pub nodes: usize,
    pub windows: WindowSet,
    pub jobs: JobGauges,
    pub rows: RowGauges,
    pub connections: u64,
    /// Nodes whose circuit breaker is open.
    pub breakers_open: usize,
    /// Nodes that shed jobs.
    pub shedding: usize,
    /// Nodes with a subscription that receives nothing.
    pub subscriptions_lost: usize,
    /// Nodes that may not admit jobs.
    pub leases_lost: usize,
    /// The identities that are closest to a limit, at most [`NEAR_LIMITS_MAX`].
    pub limits: Vec<LimitLevel>,
}

/// A node and its summary.
struct KnownNode {
    node: NodeId,
    age: Duration,
    summary: Arc<NodeSummary>,
}

impl FleetOverview {
    /// Combines what the store has, or `None` if it did not answer. The node that answers is added if the
    /// store does not have it. `alive`: the number of nodes with a lease.
    pub fn of(
        at: UnixMs,
        stored: Option<Vec<StoredSummary>>,
        own: Option<&(NodeId, Arc<NodeSummary>)>,
        alive: usize,
    ) -> Self {
        let is_answered = stored.is_some();
        let mut known: Vec<KnownNode> = stored.into_iter().flatten().filter_map(parsed).collect();
        if let Some((node, summary)) = own
            && known.iter().all(|known| known.node != *node)
        {
            known.push(KnownNode { node: *node, age: Duration::ZERO, summary: Arc::clone(summary) });
        }
        known.sort_by_key(|known| known.node);
        let complete = is_answered && known.len() >= alive;
        Self { at, complete, nodes: known.iter().map(shown).collect(), fleet: combined(&known) }
    }
}

/// `None`: the entry is not a summary. Another program may have written it.
fn parsed(stored: StoredSummary) -> Option<KnownNode> {
    let StoredSummary { node, age, summary } = stored;
    // A list would be taken for a summary whose members are all missing.
    let summary = summary.starts_with(b"{").then(|| serde_json::from_slice(&summary).ok()).flatten();
    if summary.is_none() {
        tracing::debug!(%node, "Malformed summary of a node ignored");
    }
    Some(KnownNode { node, age, summary: Arc::new(summary?) })
}

fn shown(known: &KnownNode) -> NodeOverview {
    let summary = &known.summary;
    NodeOverview {
        id: known.node.to_string(),
        version: summary.version.clone(),
        started_at: summary.started_at,
        uptime_s: summary.uptime_s,
        phase: summary.phase.clone(),
        age_ms: u64::try_from(known.age.as_millis()).unwrap_or(u64::MAX),
        gauges: summary.gauges.clone(),
        windows: WindowSet::of(&[&summary.windows]),
    }
}

fn combined(known: &[KnownNode]) -> FleetFigures {
    let gauges = || known.iter().map(|known| &known.summary.gauges);
    let sum = |of: fn(&NodeGauges) -> u64| gauges().map(of).fold(0, u64::saturating_add);
    let nodes_with = |of: fn(&NodeGauges) -> bool| gauges().filter(|gauges| of(gauges)).count();
    FleetFigures {
        nodes: known.len(),
        windows: WindowSet::of(&known.iter().map(|known| &known.summary.windows).collect::<Vec<_>>()),
        jobs: JobGauges {
            in_flight: sum(|node| node.jobs.in_flight),
            waiting: sum(|node| node.jobs.waiting),
            sends_in_flight: sum(|node| node.jobs.sends_in_flight),
            waiters: sum(|node| node.jobs.waiters),
            oldest_ms: gauges().filter_map(|node| node.jobs.oldest_ms).max(),
        },
        rows: RowGauges { waiting: sum(|node| node.rows.waiting), spilled: sum(|node| node.rows.spilled) },
        connections: sum(|node| node.connections),
        breakers_open: nodes_with(|node| node.breaker_open),
        shedding: nodes_with(|node| node.shed_permille > 0),
        subscriptions_lost: nodes_with(|node| !(node.subscriptions.results && node.subscriptions.changes)),
        leases_lost: nodes_with(|node| !node.lease_held),
        limits: highest(known),
    }
}

/// The highest levels of all nodes. Nodes share the count of a limit, so an identity is shown once.
fn highest(known: &[KnownNode]) -> Vec<LimitLevel> {
    let mut all: Vec<&LimitLevel> = known.iter().flat_map(|known| &known.summary.limits).collect();
    let identity = |level: &LimitLevel| (level.limit.clone(), level.identity.clone(), level.name.clone());
    all.sort_by(|a, b| b.level.total_cmp(&a.level).then_with(|| identity(a).cmp(&identity(b))));
    let mut shown: Vec<LimitLevel> = Vec::new();
    for level in all {
        if shown.len() >= NEAR_LIMITS_MAX {
            break;
        }
        if shown.iter().all(|other| identity(other) != identity(level)) {
            shown.push(level.clone());
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::overview::counts::WindowCounts;
    use crate::overview::windows::NodeWindows;

    fn level(name: &str, level: f64) -> LimitLevel {
        let (limit, identity) = ("api-key".to_owned(), "key".to_owned());
        LimitLevel { limit, identity, name: name.to_owned(), level, age_ms: 5 }
    }

    fn summary(accepted: u64, oldest_ms: Option<u64>, limits: Vec<LimitLevel>) -> NodeSummary {
        let minute = WindowCounts { ms: 1_000, accepted, ..WindowCounts::default() };
        NodeSummary {
            gauges: NodeGauges {
                jobs: JobGauges { in_flight: accepted, oldest_ms, ..JobGauges::default() },
                breaker_open: accepted > 5,
                lease_held: true,
                ..NodeGauges::default()
            },
            windows: NodeWindows { minute, ..NodeWindows::default() },
            limits,
            ..NodeSummary::default()
        }
    }

    fn stored(node: u32, summary: &NodeSummary) -> StoredSummary {
        let summary = serde_json::to_vec(summary).unwrap().into();
        StoredSummary { node: NodeId(node), age: Duration::from_millis(node.into()), summary }
    }

    #[test]
    fn nodes_are_combined_in_any_order() {
        let one = stored(1, &summary(3, Some(70), vec![level("a", 0.9), level("b", 0.85)]));
        let two = stored(2, &summary(7, Some(900), vec![level("a", 1.0)]));
        let all = FleetOverview::of(9, Some(vec![two.clone(), one.clone()]), None, 2);
        assert_eq!(all, FleetOverview::of(9, Some(vec![one, two]), None, 2));
        assert!(all.complete);
        let nodes: Vec<_> = all.nodes.iter().map(|node| (node.id.as_str(), node.age_ms)).collect();
        assert_eq!(nodes, [("00000001", 1), ("00000002", 2)]);
        let fleet = &all.fleet;
        assert_eq!((fleet.nodes, fleet.jobs.in_flight, fleet.jobs.oldest_ms), (2, 10, Some(900)));
        assert_eq!((fleet.breakers_open, fleet.subscriptions_lost, fleet.leases_lost), (1, 2, 0));
        assert_eq!(fleet.windows.minute.accepted_per_s, 10.0);
        assert_eq!(fleet.limits, [level("a", 1.0), level("b", 0.85)]);
    }

    #[test]
    fn malformed_entries_are_ignored_and_not_complete() {
        let good = stored(1, &summary(3, None, vec![]));
        let bad = |node, text: &'static str| StoredSummary {
            node: NodeId(node),
            age: Duration::ZERO,
            summary: text.into(),
        };
        for text in [
            "",
            "[]",
            "7",
            r#"{"gauges":{"jobs":{"inFlight":-1}}}"#,
            r#"{"windows":{"1s":{"runTimes":[9]}}}"#,
        ] {
            let all = FleetOverview::of(9, Some(vec![good.clone(), bad(2, text)]), None, 2);
            assert_eq!((all.fleet.nodes, all.fleet.jobs.in_flight, all.complete), (1, 3, false), "{text}");
        }
    }

    #[test]
    fn a_node_answers_for_itself_without_the_store() {
        let own = (NodeId(1), Arc::new(summary(3, None, vec![])));
        let alone = FleetOverview::of(9, None, Some(&own), 1);
        assert_eq!((alone.fleet.nodes, alone.fleet.jobs.in_flight, alone.complete), (1, 3, false));
        // The store has not seen it yet.
        let first = FleetOverview::of(9, Some(vec![]), Some(&own), 1);
        assert_eq!((first.fleet.nodes, first.complete), (1, true));
        // Otherwise all nodes show what the store has.
        let other = stored(1, &summary(4, None, vec![]));
        assert_eq!(FleetOverview::of(9, Some(vec![other]), Some(&own), 1).fleet.jobs.in_flight, 4);
        assert_eq!(FleetOverview::of(9, Some(vec![]), None, 1).fleet.nodes, 0);
    }

    #[test]
    fn levels_are_bounded() {
        let one = |n: u32| level(&n.to_string(), 0.8 + f64::from(n) / 1e3);
        let levels = |from: u32| (from..from + 10).map(one).collect();
        let all = [stored(1, &summary(0, None, levels(0))), stored(2, &summary(0, None, levels(10)))];
        let shown = FleetOverview::of(9, Some(all.into()), None, 2).fleet.limits;
        let names: Vec<String> = shown.into_iter().map(|level| level.name).collect();
        assert_eq!(names, (10..20).rev().map(|n| n.to_string()).collect::<Vec<_>>());
    }
}
