//! Values shared by several kinds: addresses, ports, modes, traffic distribution, locality.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::diagnostic::Diagnostics;
use crate::model::{Distribution, Locality, Mode};

const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
const TRAFFIC_DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";

pub(super) fn label<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    value(meta.labels.as_ref(), key)
}

pub(super) fn annotation<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    value(meta.annotations.as_ref(), key)
}

fn value<'a>(map: Option<&'a BTreeMap<String, String>>, key: &str) -> Option<&'a str> {
    map?.get(key).map(String::as_str)
}

/// Parses an address by which another host can be reached. Loopback, link-local and similar addresses
/// are rejected, as the API server rejects them for endpoints: they lead back into the pod.
pub(super) fn ip(text: &str) -> Result<IpAddr, String> {
    let ip: IpAddr = text
        .parse()
        .map_err(|_| format!("{text:?} is not an IP address"))?;
    let ip = ip.to_canonical();
    let special = match ip {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    match special || ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() {
        true => Err(format!("{ip} cannot be the address of another host")),
        false => Ok(ip),
    }
}

/// Parses an address, or reports it.
pub(super) fn ip_at(
    text: &str,
    field: impl Into<String>,
    diagnostics: &mut Diagnostics,
) -> Option<IpAddr> {
    ip(text)
        .map_err(|message| diagnostics.error(field, "bad_ip", message))
        .ok()
}

/// Parses a port, or reports it.
pub(super) fn port_at(
    port: i32,
    field: impl Into<String>,
    diagnostics: &mut Diagnostics,
) -> Option<u16> {
    match u16::try_from(port) {
        Ok(port) if port > 0 => Some(port),
        _ => {
            diagnostics.error(
                field,
                "bad_port",
                format!("{port} is not a port (1 to 65535)"),
            );
            None
        }
    }
}

/// The opt-in label: `ambient` is in, `none` is out, anything else is ignored and reported.
pub(super) fn dataplane_mode(meta: &ObjectMeta, diagnostics: &mut Diagnostics) -> Option<Mode> {
    match label(meta, DATAPLANE_MODE)? {
        "ambient" => Some(Mode::Mesh),
        "none" => Some(Mode::Plain),
        other => {
            let message = format!("{other:?} is neither \"ambient\" nor \"none\"");
            diagnostics.error(
                format!("metadata.labels[{DATAPLANE_MODE}]"),
                "bad_label_value",
                message,
            );
            None
        }
    }
}

/// Istio's annotation for services and namespaces; not case-sensitive.
pub(super) fn distribution_annotation(
    meta: &ObjectMeta,
    diagnostics: &mut Diagnostics,
) -> Option<Distribution> {
    let text = annotation(meta, TRAFFIC_DISTRIBUTION)?;
    let distribution = distribution(text);
    if distribution.is_none() {
        let field = format!("metadata.annotations[{TRAFFIC_DISTRIBUTION}]");
        diagnostics.error(
            field,
            "bad_annotation_value",
            format!("{text:?} is not a traffic distribution"),
        );
    }
    distribution
}

pub(super) fn distribution(text: &str) -> Option<Distribution> {
    match text.to_ascii_lowercase().as_str() {
        "preferclose" | "prefersamezone" => Some(Distribution::PreferSameZone),
        "prefersamenode" => Some(Distribution::PreferSameNode),
        "" => Some(Distribution::Any),
        _ => None,
    }
}

/// The topology labels of a node.
pub(super) fn locality(meta: &ObjectMeta) -> Locality {
    let text = |key, old| {
        label(meta, key)
            .or_else(|| label(meta, old))
            .unwrap_or_default()
            .into()
    };
    Locality {
        region: text(
            "topology.kubernetes.io/region",
            "failure-domain.beta.kubernetes.io/region",
        ),
        zone: text(
            "topology.kubernetes.io/zone",
            "failure-domain.beta.kubernetes.io/zone",
        ),
        subzone: text("topology.istio.io/subzone", ""),
    }
}
