//! What a watcher sees.

use super::event::EventType;
use super::record::EventRecord;
use crate::model::{Caller, FunctionId};
use std::sync::Arc;

/// The filter of a watcher. An empty list admits everything.
#[derive(Clone, Debug, Default)]
pub struct EventFilter {
    pub functions: Vec<FunctionId>,
    pub statuses: Vec<String>,
    pub kinds: Vec<EventType>,
    /// The key of the watcher. It sees only the functions that it may run.
    pub caller: Option<Arc<Caller>>,
}

impl EventFilter {
    /// Whether the watcher sees the event. Events of workers and nodes are about no function, so every key
    /// sees them. How many events were skipped is never left out.
    pub fn admits(&self, event: &EventRecord) -> bool {
        if event.kind == EventType::Sampled {
            return true;
        }
        let is_allowed = |function| self.caller.as_ref().is_none_or(|caller| caller.may_run(function));
        let is_named = |function| self.functions.is_empty() || self.functions.contains(function);
        let fits = match &event.function {
            Some(function) => is_named(function) && is_allowed(function),
            None => self.functions.is_empty(),
        };
        let has_status = |status: &String| self.statuses.contains(status);
        fits && (self.kinds.is_empty() || self.kinds.contains(&event.kind))
            && (self.statuses.is_empty() || event.status.as_ref().is_some_and(has_status))
    }
}

/// Filters are equal if they admit the same events.
impl PartialEq for EventFilter {
    fn eq(&self, other: &Self) -> bool {
        let allowed = |filter: &Self| filter.caller.as_ref().is_none_or(|caller| caller.functions.is_none());
        let same_allowed = match (&self.caller, &other.caller) {
            (Some(one), Some(two)) => one.functions == two.functions,
            _ => allowed(self) && allowed(other),
        };
        let members =
            |filter: &Self| (filter.functions.clone(), filter.statuses.clone(), filter.kinds.clone());
        same_allowed && members(self) == members(other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{EventId, StreamedEvent};
    use crate::model::{AllowedFunctions, Scope};

    fn record(body: &str) -> EventRecord {
        let event = StreamedEvent { id: EventId::new(1, 0), body: body.to_owned().into() };
        EventRecord::of(&event).unwrap()
    }

    fn key(functions: Option<&[&str]>) -> Option<Arc<Caller>> {
        let names = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let functions = functions.map(|functions| AllowedFunctions::new(&names(functions)));
        Some(Arc::new(Caller { name: "k".into(), scopes: vec![Scope::Read], functions, jobs_max: None }))
    }

    #[test]
    fn filters_admit_events() {
        let finished = record(r#"{"type":"job.finished","functionId":"f","status":"FAILED"}"#);
        let changed = record(r#"{"type":"function.changed","functionId":"g"}"#);
        let joined = record(r#"{"type":"worker.joined","workerId":"w"}"#);
        let sampled = record(r#"{"type":"sampled","kept":1,"seen":2}"#);
        let function = |id: &str| vec![FunctionId::parse(id).unwrap()];
        let all = EventFilter::default();
        for (filter, admitted) in [
            (all.clone(), [true; 4]),
            (EventFilter { functions: function("f"), ..all.clone() }, [true, false, false, true]),
            (EventFilter { statuses: vec!["FAILED".into()], ..all.clone() }, [true, false, false, true]),
            (EventFilter { statuses: vec!["SUCCESS".into()], ..all.clone() }, [false, false, false, true]),
            (EventFilter { kinds: vec![EventType::WorkerJoined], ..all.clone() }, [false, false, true, true]),
            (EventFilter { caller: key(Some(&["g"])), ..all.clone() }, [false, true, true, true]),
            (EventFilter { caller: key(None), ..all.clone() }, [true; 4]),
        ] {
            let seen = [&finished, &changed, &joined, &sampled].map(|event| filter.admits(event));
            assert_eq!(seen, admitted, "{filter:?}");
        }
    }

    #[test]
    fn keys_with_the_same_functions_share_a_filter() {
        let of = |caller| EventFilter { caller, ..EventFilter::default() };
        assert_eq!(of(key(Some(&["f"]))), of(key(Some(&["f"]))));
        assert_eq!(of(key(None)), of(None));
        assert_ne!(of(key(Some(&["f"]))), of(key(None)));
        assert_ne!(of(key(Some(&["f"]))), of(None));
    }
}
