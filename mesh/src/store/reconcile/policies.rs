//! Keeps the old allocation of every equal policy report.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::id::ObjectRef;
use crate::id::WorkloadUid;
use crate::policy::PolicyReport;

type List = Arc<[WorkloadUid]>;

/// Replaces every report that equals its old version by that version. Returns the changed policies.
pub(super) fn reconcile(
    old: &Arc<[Arc<PolicyReport>]>,
    new: &mut Arc<[Arc<PolicyReport>]>,
) -> Vec<ObjectRef> {
    let mut known: FxHashMap<&ObjectRef, &Arc<PolicyReport>> =
        old.iter().map(|report| (&report.object, report)).collect();
    let mut lists = EqualLists::default();
    let mut changed = Vec::new();
    let mut reports = Vec::with_capacity(new.len());
    for report in new.iter() {
        match known.remove(&report.object) {
            Some(old) if is_equal(old, report, &mut lists) => reports.push(old.clone()),
            _ => {
                changed.push(report.object.clone());
                reports.push(report.clone());
            }
        }
    }
    changed.extend(known.into_keys().cloned());
    changed.sort_unstable();
    match changed.is_empty() {
        true => *new = old.clone(),
        false => *new = reports.into(),
    }
    changed
}

fn is_equal(old: &PolicyReport, new: &PolicyReport, lists: &mut EqualLists) -> bool {
    let PolicyReport {
        object: _,
        state,
        messages,
        selects,
        dry_run,
        action,
        scope,
        rules,
    } = new;
    (&old.state, &old.dry_run, &old.action, &old.scope) == (state, dry_run, action, scope)
        && old.messages == *messages
        && old.rules == *rules
        && lists.equal(&old.selects, selects)
}

/// Compares lists of workloads, each pair once. Policies share their lists: 10,000 policies for 1,000
/// workloads would otherwise be ten million comparisons of names.
#[derive(Default)]
struct EqualLists(FxHashMap<(*const WorkloadUid, *const WorkloadUid), bool>);

impl EqualLists {
    fn equal(&mut self, old: &List, new: &List) -> bool {
        // Both lists outlive this cache, so an address identifies a list.
        let key = (old.as_ptr(), new.as_ptr());
        old.len() == new.len() && *self.0.entry(key).or_insert_with(|| old == new)
    }
}
