//! Extracts nodes: locality and addresses.

use k8s_openapi::api::core::v1 as core;

use super::values;
use crate::diagnostic::Diagnostics;
use crate::model::Node;
use crate::names::{self, Form, Scope};

pub(super) fn read(object: &core::Node, diagnostics: &mut Diagnostics) -> Option<Node> {
    names::check(
        &object.metadata,
        Scope::Cluster(Form::Subdomain),
        diagnostics,
    );
    let addresses = object.status.as_ref().and_then(|s| s.addresses.as_ref());
    let mut ips = Vec::new();
    for (i, address) in addresses.into_iter().flatten().enumerate() {
        if matches!(address.type_.as_str(), "InternalIP" | "ExternalIP") {
            let field = format!("status.addresses[{i}].address");
            ips.extend(values::ip_at(&address.address, field, diagnostics));
        }
    }
    let name = object.metadata.name.as_deref()?.into();
    let node = Node {
        name,
        addresses: ips,
        locality: values::locality(&object.metadata),
    };
    (!diagnostics.is_fatal()).then_some(node)
}
