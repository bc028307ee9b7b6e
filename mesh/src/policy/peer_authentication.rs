//! PeerAuthentication: is a connection without a verified identity accepted?
//!
//! There are three levels: the mesh (root namespace, no selector), the namespace (no selector) and
//! the workload (selector). Among several policies of one level the oldest counts, then the first by
//! name. The narrowest level with another mode than UNSET decides. The workload level may set the
//! mode of single ports; a port that it does not list, or lists as UNSET, has the mode of the
//! workload.
//!
//! DISABLE is PERMISSIVE: connections of the mesh use the tunnel with any mode, and plaintext is
//! accepted. An invalid policy makes everything it selects STRICT, regardless of other policies.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::document::{Field, Reader};
use super::envelope::{self, Scope};
use super::report::PolicyScope;
use super::{Context, Denial};
use crate::policy::Policy;

/// The API versions, which are equivalent.
const API_VERSIONS: [&str; 2] = ["security.istio.io/v1", "security.istio.io/v1beta1"];

/// The mode of a workload or port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// The next level decides.
    Unset,
    Disable,
    Permissive,
    Strict,
}

impl Mode {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Mode::Unset => "Unset",
            Mode::Disable => "Disable",
            Mode::Permissive => "Permissive",
            Mode::Strict => "Strict",
        }
    }
}

/// A PeerAuthentication, parsed by itself.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PeerAuthentication {
    pub(super) mode: Mode,
    ports: Vec<(u16, Mode)>,
    /// It overrides the other policies.
    invalid: bool,
    /// It applies to some workload. A selector in the root namespace applies to none.
    pub(super) enforced: bool,
    level: Level,
    created: Option<Time>,
    denial: Denial,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Mesh,
    Namespace,
    Workload,
}

/// Reads a policy. Always yields one: an invalid policy is STRICT.
pub(super) fn read(
    policy: &Policy,
    context: &Context,
    reader: &mut Reader<'_>,
) -> (PeerAuthentication, Scope) {
    envelope::envelope(policy, &API_VERSIONS, reader);
    let spec = Field::top("spec", policy.document.get("spec"));
    envelope::expect_object(&spec, policy, reader);
    spec.expect_keys(&["selector", "mtls", "portLevelMtls"], reader);
    let scope = envelope::scope(policy, &spec, context, reader);
    let mode = match spec.value.get("mtls") {
        None => Mode::Unset,
        Some(_) => mode(&spec.get_or_null("mtls"), reader),
    };
    let ports = ports(&spec, &scope, reader);
    let level = match scope.kind {
        PolicyScope::Global => Level::Mesh,
        PolicyScope::Namespace => Level::Namespace,
        PolicyScope::WorkloadSelector => Level::Workload,
    };
    let invalid = reader.has_error();
    let enforced = invalid || !(level == Level::Workload && scope.is_in_root);
    if !enforced {
        let message = "NOT enforced: in the root namespace a selector selects nothing".to_owned();
        reader.note("spec.selector", "not_enforced", message);
    }
    let peer = PeerAuthentication {
        mode: if invalid { Mode::Strict } else { mode },
        ports: if invalid { Vec::new() } else { ports },
        invalid,
        enforced,
        level,
        created: policy.metadata.creation_timestamp.clone(),
        denial: Denial {
            policy: envelope::name(policy).into(),
        },
    };
    (peer, scope)
}

/// An invalid mode is STRICT.
fn mode(field: &Field<'_>, reader: &mut Reader<'_>) -> Mode {
    if !field.value.is_object() {
        field.error("bad_field", "is not an object".to_owned(), reader);
        return Mode::Strict;
    }
    field.expect_keys(&["mode"], reader);
    let Some(value) = field.value.get("mode") else {
        return Mode::Unset;
    };
    match value.as_str() {
        Some("UNSET") => Mode::Unset,
        Some("DISABLE") => Mode::Disable,
        Some("PERMISSIVE") => Mode::Permissive,
        Some("STRICT") => Mode::Strict,
        _ => {
            let message = format!(
                "{value} is not one of UNSET, DISABLE, PERMISSIVE and STRICT; read as STRICT"
            );
            field
                .get_or_null("mode")
                .error("unknown_mode", message, reader);
            Mode::Strict
        }
    }
}

fn ports(spec: &Field<'_>, scope: &Scope, reader: &mut Reader<'_>) -> Vec<(u16, Mode)> {
    let Some(value) = spec.value.get("portLevelMtls") else {
        return Vec::new();
    };
    let field = spec.get_or_null("portLevelMtls");
    let Some(entries) = value.as_object().filter(|entries| !entries.is_empty()) else {
        field.error("bad_field", "names no port".to_owned(), reader);
        return Vec::new();
    };
    if scope.kind != PolicyScope::WorkloadSelector {
        let message = "needs a selector: ports are those of a workload".to_owned();
        field.error("port_without_selector", message, reader);
    }
    let mut ports = Vec::with_capacity(entries.len());
    for key in entries.keys() {
        let entry = field.get_or_null(key);
        let digits = key.bytes().all(|b| b.is_ascii_digit());
        match key.parse::<u16>() {
            Ok(port) if digits && port > 0 => ports.push((port, mode(&entry, reader))),
            _ => {
                let message = format!("{key:?} is not a port (1 to 65535)");
                entry.error("bad_port", message, reader);
            }
        }
    }
    ports
}

/// The effective modes of one workload.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct PeerMode {
    /// The policy that denies plaintext; `None` if plaintext is accepted.
    default: Option<Denial>,
    /// The ports with a mode of their own.
    ports: Vec<(u16, Option<Denial>)>,
}

impl PeerMode {
    /// Combines all policies that select a workload; each is enforced.
    pub(super) fn of(policies: &[&Arc<PeerAuthentication>]) -> Self {
        if let Some(invalid) = oldest(policies, |policy| policy.invalid) {
            return Self {
                default: Some(invalid.denial.clone()),
                ports: Vec::new(),
            };
        }
        let at = |level| oldest(policies, move |policy| policy.level == level);
        let (mesh, namespace, workload) =
            (at(Level::Mesh), at(Level::Namespace), at(Level::Workload));
        let levels = [workload, namespace, mesh];
        let decisive = levels.into_iter().flatten().find(|p| p.mode != Mode::Unset);
        let default = decisive.and_then(|policy| policy.denial(policy.mode));
        let ports = workload.map_or(Vec::new(), |policy| {
            let set = policy.ports.iter().filter(|(_, mode)| *mode != Mode::Unset);
            set.map(|(port, mode)| (*port, policy.denial(*mode)))
                .collect()
        });
        Self { default, ports }
    }

    /// Whether plaintext is accepted on every port.
    pub(super) fn is_permissive(&self) -> bool {
        self.default.is_none() && self.ports.iter().all(|(_, denial)| denial.is_none())
    }

    /// Why plaintext to this port is denied.
    pub(super) fn denial(&self, port: u16) -> Option<&Denial> {
        let own = self.ports.iter().find(|(own, _)| *own == port);
        own.map_or(&self.default, |(_, denial)| denial).as_ref()
    }
}

impl PeerAuthentication {
    fn denial(&self, mode: Mode) -> Option<Denial> {
        (mode == Mode::Strict).then(|| self.denial.clone())
    }
}

/// The oldest policy among some. A policy without a creation time counts as the oldest: files seldom
/// have one.
fn oldest<'a>(
    policies: &[&'a Arc<PeerAuthentication>],
    among: impl Fn(&PeerAuthentication) -> bool,
) -> Option<&'a Arc<PeerAuthentication>> {
    let candidates = policies.iter().copied().filter(|policy| among(policy));
    candidates.min_by_key(|policy| (&policy.created, &policy.denial.policy))
}
