//! Reports of policies, as many of the old ones as say the same.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use crate::id::ObjectRef;
use crate::id::WorkloadUid;
use crate::policy::PolicyReport;

type List = Arc<[WorkloadUid]>;

/// Replaces every report that equals its old version by that version, and says which are others.
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
            Some(old) if says_the_same(old, report, &mut lists) => reports.push(old.clone()),
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

fn says_the_same(old: &PolicyReport, new: &PolicyReport, lists: &mut EqualLists) -> bool {
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

/// Policies share their lists of workloads. Each pair of lists is compared once: 10,000 policies
/// for 1,000 workloads would be ten million comparisons of names.
#[derive(Default)]
struct EqualLists(FxHashMap<(*const WorkloadUid, *const WorkloadUid), bool>);

impl EqualLists {
    fn equal(&mut self, old: &List, new: &List) -> bool {
        // Both lists live as long as this does, so an address stands for one list.
        let key = (old.as_ptr(), new.as_ptr());
        old.len() == new.len() && *self.0.entry(key).or_insert_with(|| old == new)
    }
}
