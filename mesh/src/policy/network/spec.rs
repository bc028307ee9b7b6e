//! Reads the spec of a NetworkPolicy. Every error is reported; after one the policy admits nothing.

use super::ingress_rule::{From, IpBlock, Peer, Port, Ports, Rule};
use super::{Ingress, NetworkPolicy};
use crate::diagnostic::Diagnostics;
use crate::names::namespace_of;
use crate::policy::Policy;
use crate::policy::cidr::Cidr;
use crate::policy::document::{Field, Reader};
use crate::policy::envelope::envelope;
use crate::policy::selector::{self, Selector};

/// The only supported version. In another version the same fields may mean something else.
const API_VERSION: &str = "networking.k8s.io/v1";

/// Reads a policy. Always yields one: an invalid policy denies.
pub(crate) fn read(object: &Policy, diagnostics: &mut Diagnostics) -> NetworkPolicy {
    let mut reader = Reader::new(diagnostics);
    let spec = spec(object, &mut reader);
    let types = types(&spec, &mut reader);
    // An invalid field may be about ingress, regardless of `policyTypes`.
    let about_ingress = types.ingress || reader.has_error();
    let pods = match spec.get("podSelector") {
        Some(selector) => selector::parse(&selector, &mut reader),
        None => Some(Selector::default()),
    };
    let items = spec.items("ingress", &mut reader);
    let rules = each(items, |item| rule(item, &mut reader));
    let ingress = match rules {
        _ if !about_ingress => Ingress::Unrestricted,
        Some(rules) if !reader.has_error() => Ingress::Only(rules),
        _ => Ingress::Only(Vec::new()),
    };
    if types.egress {
        note_egress(about_ingress, &mut reader);
    }
    NetworkPolicy {
        namespace: namespace_of(&object.metadata).into(),
        name: object.metadata.name.as_deref().unwrap_or_default().into(),
        pods,
        ingress,
    }
}

fn note_egress(about_ingress: bool, reader: &mut Reader<'_>) {
    let rest = match about_ingress {
        true => "its ingress side is",
        false => "it restricts nothing here",
    };
    let message = format!("egress is left to the CNI and not enforced by the mesh; {rest}");
    reader.note("spec.egress", "egress_not_enforced", message);
}

/// A missing spec is an empty one, which denies everything in Kubernetes.
fn spec<'a>(object: &'a Policy, reader: &mut Reader<'_>) -> Field<'a> {
    envelope(object, &[API_VERSION], reader);
    let spec = Field::top("spec", object.document.get("spec"));
    spec.expect_keys(&["podSelector", "policyTypes", "ingress", "egress"], reader);
    spec
}

/// Which directions a policy restricts.
struct Types {
    ingress: bool,
    egress: bool,
}

/// Without `policyTypes` a policy restricts ingress, and egress if it has egress rules.
fn types(spec: &Field<'_>, reader: &mut Reader<'_>) -> Types {
    let listed: Vec<Field<'_>> = spec.items("policyTypes", reader).collect();
    if listed.is_empty() {
        let egress = spec.get("egress").is_some_and(|rules| !rules.is_empty());
        return Types {
            ingress: true,
            egress,
        };
    }
    let mut types = Types {
        ingress: false,
        egress: false,
    };
    for item in &listed {
        match item.value.as_str() {
            Some("Ingress") => types.ingress = true,
            Some("Egress") => types.egress = true,
            _ => {
                let message = format!("{} is neither \"Ingress\" nor \"Egress\"", item.value);
                item.error("bad_value", message, reader);
            }
        }
    }
    types
}

fn rule(field: &Field<'_>, reader: &mut Reader<'_>) -> Option<Rule> {
    if !field.expect_present(reader) {
        return None;
    }
    field.expect_keys(&["from", "ports"], reader);
    let peers = each(field.items("from", reader), |item| peer(item, reader));
    let ports = each(field.items("ports", reader), |item| port(item, reader));
    let peers = peers?;
    Some(Rule {
        from: match peers.is_empty() {
            true => From::Anyone,
            false => From::Peers(peers),
        },
        ports: join_ports(ports?),
    })
}

/// Reads all items, so that the diagnostics of each are found; `None` if one cannot be read.
fn each<'a, T>(
    items: impl Iterator<Item = Field<'a>>,
    read: impl FnMut(&Field<'a>) -> Option<T>,
) -> Option<Vec<T>> {
    let mut read = read;
    let found: Vec<Option<T>> = items.map(|item| read(&item)).collect();
    found.into_iter().collect()
}

fn peer(field: &Field<'_>, reader: &mut Reader<'_>) -> Option<Peer> {
    if !field.expect_keys(&["podSelector", "namespaceSelector", "ipBlock"], reader) {
        return None;
    }
    let [pods, namespaces, block] =
        ["podSelector", "namespaceSelector", "ipBlock"].map(|key| field.get(key));
    let selects = pods.is_some() || namespaces.is_some();
    match (block, selects) {
        (Some(block), false) => ip_block(&block, reader),
        (None, true) => {
            let mut selector = |field: Option<Field<'_>>| match field {
                Some(field) => selector::parse(&field, reader).map(Some),
                None => Some(None),
            };
            let (pods, namespaces) = (selector(pods), selector(namespaces));
            Some(Peer::Pods {
                namespaces: namespaces?,
                pods: pods?.unwrap_or_default(),
            })
        }
        (Some(_), true) => {
            let message = "ipBlock cannot be combined with a selector".to_owned();
            field.error("ambiguous_peer", message, reader);
            None
        }
        (None, false) => {
            let message =
                "is empty; needs one of podSelector, namespaceSelector and ipBlock".to_owned();
            field.error("empty_peer", message, reader);
            None
        }
    }
}

fn ip_block(field: &Field<'_>, reader: &mut Reader<'_>) -> Option<Peer> {
    if !field.expect_keys(&["cidr", "except"], reader) {
        return None;
    }
    let cidr = field.get_or_null("cidr");
    let cidr = block(&cidr, reader);
    let mut except = Vec::new();
    for item in field.items("except", reader) {
        let Some(hole) = block(&item, reader) else {
            continue;
        };
        if cidr.is_some_and(|cidr| !cidr.strictly_contains(&hole)) {
            let message = format!("{hole} is not a part of the block that it excepts from");
            item.error("bad_except", message, reader);
        }
        except.push(hole);
    }
    Some(Peer::IpBlock(IpBlock {
        cidr: cidr?,
        except,
    }))
}

fn block(field: &Field<'_>, reader: &mut Reader<'_>) -> Option<Cidr> {
    let text = field.text(reader)?;
    Cidr::parse(text)
        .map_err(|message| field.error("bad_cidr", message, reader))
        .ok()
}

/// The protocol and port of an entry of `ports`.
enum Protocol {
    /// `None` for all ports.
    Tcp(Option<Port>),
    /// The mesh carries TCP only.
    Other,
}

fn join_ports(entries: Vec<Protocol>) -> Ports {
    let none_listed = entries.is_empty();
    let mut ports = Vec::new();
    for entry in entries {
        match entry {
            Protocol::Tcp(None) => return Ports::All,
            Protocol::Tcp(Some(port)) => ports.push(port),
            Protocol::Other => {}
        }
    }
    match none_listed {
        true => Ports::All,
        false => Ports::These(ports),
    }
}

fn port(field: &Field<'_>, reader: &mut Reader<'_>) -> Option<Protocol> {
    if !field.expect_present(reader) {
        return None;
    }
    field.expect_keys(&["protocol", "port", "endPort"], reader);
    let tcp = match field.get("protocol") {
        None => true,
        Some(protocol) => match protocol.value.as_str() {
            Some("TCP") => true,
            Some("UDP" | "SCTP") => false,
            _ => {
                let message = format!("{} is not one of TCP, UDP and SCTP", protocol.value);
                protocol.error("bad_protocol", message, reader);
                return None;
            }
        },
    };
    let port = match (field.get("port"), field.get("endPort")) {
        (None, None) => None,
        (Some(first), None) if first.value.is_string() => Some(Port::Named(name(&first, reader)?)),
        (Some(first), None) => {
            let number = number(&first, reader)?;
            Some(Port::Range(number, number))
        }
        (first, Some(last)) => Some(range(first.as_ref(), &last, reader)?),
    };
    Some(match tcp {
        true => Protocol::Tcp(port),
        false => Protocol::Other,
    })
}

fn range(first: Option<&Field<'_>>, last: &Field<'_>, reader: &mut Reader<'_>) -> Option<Port> {
    let Some(first) = first.filter(|first| !first.value.is_string()) else {
        let message = "needs a port with a number to begin at".to_owned();
        last.error("bad_port", message, reader);
        return None;
    };
    let (begin, end) = (number(first, reader)?, number(last, reader)?);
    if end < begin {
        let message = format!("{end} is before {begin}");
        last.error("bad_port", message, reader);
        return None;
    }
    Some(Port::Range(begin, end))
}

fn number(field: &Field<'_>, reader: &mut Reader<'_>) -> Option<u16> {
    let number = field.value.as_u64().and_then(|n| u16::try_from(n).ok());
    let number = number.filter(|number| *number > 0);
    if number.is_none() {
        let message = format!("{} is not a port (1 to 65535)", field.value);
        field.error("bad_port", message, reader);
    }
    number
}

/// Reads a port name. An invalid name would match no container port; it may be a quoted number.
fn name(field: &Field<'_>, reader: &mut Reader<'_>) -> Option<Box<str>> {
    let name = field.text(reader)?;
    let legal = (1..=15).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && name.bytes().any(|b| b.is_ascii_lowercase())
        && !name.starts_with('-')
        && !name.ends_with('-')
        && !name.contains("--");
    if !legal {
        let message = format!("{name:?} is not a valid port name; write a number without quotes");
        field.error("bad_port", message, reader);
        return None;
    }
    Some(name.into())
}
