//! AuthorizationPolicy.
//!
//! With an invalid field, an ALLOW policy never matches, and a DENY policy matches as if the
//! constraint were absent. So an error denies more than intended, never less. What Istio's admission
//! webhook rejects (an empty match, DENY without rules, a selector together with `targetRefs`) is an
//! error here too: files pass no webhook.
//!
//! HTTP attributes are valid, but a connection has none. As in Istio, an ALLOW rule that uses any is
//! left out; in a DENY rule the attributes are left out, and a clause of nothing else never matches.

mod attributes;
pub(super) mod matching;
mod rules;

use serde_json::Value;

use super::connection::ConnectionAttributes;
use super::document::{Field, Reader};
use super::envelope::{self, Scope};
use super::{Context, Denial};
use crate::policy::Policy;

use matching::Rule;
use rules::{HttpAttributes, RuleReader};

/// The API versions, which are equivalent.
const API_VERSIONS: [&str; 2] = ["security.istio.io/v1", "security.istio.io/v1beta1"];
const SPEC: [&str; 6] = [
    "selector",
    "targetRef",
    "targetRefs",
    "rules",
    "action",
    "provider",
];
const DRY_RUN: &str = "istio.io/dry-run";

/// The effect of a policy on a connection that it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Allow,
    Deny,
    /// For an external authorizer; never evaluated for a connection, as in Istio.
    Custom,
    /// For an audit log; never evaluated for a connection, as in Istio.
    Audit,
}

impl Action {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Action::Allow => "Allow",
            Action::Deny => "Deny",
            Action::Custom => "Custom",
            Action::Audit => "Audit",
        }
    }
}

/// A parsed AuthorizationPolicy.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Authorization {
    pub(super) action: Action,
    pub(super) dry_run: bool,
    /// It is evaluated for connections. False if it is for a waypoint or gateway.
    pub(super) enforced: bool,
    pub(super) rules: Vec<Rule>,
    pub(super) denial: Denial,
}

impl Authorization {
    pub(super) fn matches(&self, connection: &ConnectionAttributes<'_>) -> bool {
        self.rules.iter().any(|rule| rule.matches(connection))
    }
}

/// Reads a policy. Always yields one: an invalid policy denies.
pub(super) fn read(
    policy: &Policy,
    context: &Context,
    reader: &mut Reader<'_>,
) -> (Authorization, Scope) {
    let known_version = envelope::envelope(policy, &API_VERSIONS, reader);
    let spec = Field::top("spec", policy.document.get("spec"));
    envelope::expect_object(&spec, policy, reader);
    let before = reader.count();
    spec.expect_keys(&SPEC, reader);
    let known_fields = reader.count() == before;
    let scope = envelope::scope(policy, &spec, context, reader);
    let attached = is_attached(&spec, reader);
    let action = action(policy, &spec, reader);
    let mut rules = RuleReader::new(reader, &scope.namespace, &context.trust_domains);
    let read = rules.read(&spec, action.unwrap_or(Action::Allow));
    let http = rules.into_http();
    let (action, rules) = match (action, read) {
        // The action or the version is unknown: the policy denies everything.
        (None, _) => (Action::Deny, vec![Rule::default()]),
        (Some(_), _) if !known_version => (Action::Deny, vec![Rule::default()]),
        (Some(Action::Allow), _) if reader.has_error() => (Action::Allow, Vec::new()),
        // An unknown field may be a misspelt constraint.
        (Some(Action::Deny), _) if !known_fields => (Action::Deny, vec![Rule::default()]),
        (Some(action), rules) => (action, rules),
    };
    let authorization = Authorization {
        action,
        dry_run: dry_run(policy, reader),
        enforced: !attached && matches!(action, Action::Allow | Action::Deny),
        rules,
        denial: Denial {
            policy: envelope::name(policy).into(),
        },
    };
    note(&authorization, attached, &http, reader);
    (authorization, scope)
}

/// Whether the policy is attached to a waypoint or gateway. An invalid reference attaches it to
/// nothing.
fn is_attached(spec: &Field<'_>, reader: &mut Reader<'_>) -> bool {
    let (mut attached, mut certain) = (false, true);
    for key in ["targetRef", "targetRefs"] {
        let Some(value) = spec.value.get(key) else {
            continue;
        };
        let field = spec.get_or_null(key);
        let before = reader.count();
        match value {
            Value::Object(_) if key == "targetRef" => target(&field, reader),
            Value::Array(items) if key == "targetRefs" && !items.is_empty() => {
                spec.items(key, reader)
                    .collect::<Vec<_>>()
                    .iter()
                    .for_each(|item| target(item, reader));
            }
            _ => {
                let message = "is not a reference; the policy applies to pods instead".to_owned();
                field.error("bad_field", message, reader);
            }
        }
        attached = true;
        certain &= reader.count() == before;
    }
    attached &= certain;
    if attached && spec.value.get("selector").is_some() {
        let message = "cannot be combined with targetRefs; the policy applies to pods".to_owned();
        let selector = spec.get_or_null("selector");
        selector.error("selector_and_target", message, reader);
        return false;
    }
    attached
}

/// Checks a reference. With an invalid reference the policy may be meant for pods.
fn target(field: &Field<'_>, reader: &mut Reader<'_>) {
    if !field.value.is_object() {
        return field.error("bad_field", "is not a reference".to_owned(), reader);
    }
    field.expect_keys(
        &["group", "kind", "name", "namespace", "sectionName"],
        reader,
    );
    for key in ["kind", "name"] {
        let at = field.get_or_null(key);
        if at.text(reader) == Some("") {
            at.error("bad_field", "is empty".to_owned(), reader);
        }
    }
}

/// Reads the action; `None` if it is unknown.
fn action(policy: &Policy, spec: &Field<'_>, reader: &mut Reader<'_>) -> Option<Action> {
    let value = spec.value.get("action");
    let action = match value {
        None if may_be_misspelt(policy, spec) => None,
        None => Some(Action::Allow),
        Some(value) => known_action(spec, value, reader),
    };
    if spec.value.get("provider").is_some() && action != Some(Action::Custom) {
        let message = "belongs to the action CUSTOM".to_owned();
        let field = spec.get_or_null("provider");
        field.error("bad_field", message, reader);
    }
    action
}

/// A policy without an action allows, unless an invalid field may be its action: a spec that is not an
/// object or is misspelt, or an unknown field with a string value.
fn may_be_misspelt(policy: &Policy, spec: &Field<'_>) -> bool {
    let unknown = policy.document.iter();
    let mut unknown = unknown.filter(|(key, _)| !envelope::DOCUMENT.contains(&key.as_str()));
    match spec.value {
        Value::Object(fields) => {
            let mut within = fields.iter();
            unknown.any(|(_, value)| value.is_string())
                || within.any(|(key, value)| !SPEC.contains(&key.as_str()) && value.is_string())
        }
        _ => policy.document.contains_key("spec") || unknown.next().is_some(),
    }
}

fn known_action(spec: &Field<'_>, value: &Value, reader: &mut Reader<'_>) -> Option<Action> {
    let action = match value.as_str() {
        Some("ALLOW") => Some(Action::Allow),
        Some("DENY") => Some(Action::Deny),
        Some("CUSTOM") => Some(Action::Custom),
        Some("AUDIT") => Some(Action::Audit),
        _ => None,
    };
    if action.is_none() {
        let message = format!("{value} is none of ALLOW, DENY, AUDIT and CUSTOM; read as DENY");
        let field = spec.get_or_null("action");
        field.error("unknown_action", message, reader);
    }
    action
}

/// Whether the policy is dry-run. The accepted spellings are those of Go's `ParseBool`; any other
/// value enforces the policy.
fn dry_run(policy: &Policy, reader: &mut Reader<'_>) -> bool {
    let annotations = policy.metadata.annotations.as_ref();
    match annotations
        .and_then(|annotations| annotations.get(DRY_RUN))
        .map(String::as_str)
    {
        None | Some("" | "0" | "f" | "F" | "false" | "False" | "FALSE") => false,
        Some("1" | "t" | "T" | "true" | "True" | "TRUE") => true,
        Some(other) => {
            let message = format!("{other:?} is neither true nor false; the policy is enforced");
            let field = format!("metadata.annotations[{DRY_RUN}]");
            reader.note(field, "bad_annotation_value", message);
            false
        }
    }
}

/// Adds notes about a policy that denies less, or more, than it specifies.
fn note(policy: &Authorization, attached: bool, http: &HttpAttributes, reader: &mut Reader<'_>) {
    if attached {
        let message =
            "NOT enforced here: it is for the waypoint or gateway it refers to".to_owned();
        return reader.note("spec.targetRefs", "not_enforced", message);
    }
    if !policy.enforced {
        let action = policy.action.as_str().to_ascii_uppercase();
        let message = format!(
            "NOT enforced: {action} does not apply to connections; what it should refuse is allowed"
        );
        return reader.note("spec.action", "not_enforced", message);
    }
    // After an error the rules are not evaluated as written, so the note would be wrong.
    let Some(found) = http.list().filter(|_| !reader.has_error()) else {
        return;
    };
    let effect = match policy.action {
        Action::Allow => "the rules that use them are left out, so less is allowed than they say",
        _ if http.deny_nothing => {
            "a rule has nothing else to match by, so IT REFUSES NOTHING; bind the policy to a waypoint"
        }
        _ => "the rules hold without them, so more is denied than they say",
    };
    let message = format!("connections have no HTTP attributes ({found}): {effect}");
    reader.note("spec.rules", "http_attributes", message);
}
