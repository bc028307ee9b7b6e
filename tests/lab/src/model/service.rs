//! Resolves the ClusterIPs and IP families of a service.

use std::net::IpAddr;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{Service, ServiceSpec};

use super::ipam::AddressPool;
use super::pod::family_named;
use crate::options::IpFamily;

/// The ClusterIPs of a service, in the order of its IP families; empty when headless.
pub(crate) fn cluster_ips(service: &Service) -> Vec<IpAddr> {
    let spec = service.spec.as_ref();
    let ips = spec
        .and_then(|spec| spec.cluster_ips.as_ref())
        .into_iter()
        .flatten();
    ips.filter_map(|ip| ip.parse().ok()).collect()
}

pub(crate) fn is_headless(service: &Service) -> bool {
    service
        .spec
        .as_ref()
        .and_then(|spec| spec.cluster_ip.as_deref())
        == Some("None")
}

/// Fills in `clusterIP`, `clusterIPs`, `ipFamilies` and `ipFamilyPolicy`, as the API server does on
/// a dual-stack cluster.
pub(crate) fn resolve(
    service: &mut Service,
    pools: &mut [AddressPool; 2],
    owner: &str,
) -> Result<()> {
    let spec = service.spec.get_or_insert_default();
    if spec.type_.as_deref() == Some("ExternalName") {
        return Ok(());
    }
    let fixed = fixed_ips(spec)?;
    let families = families(spec, &fixed)?;
    if spec.cluster_ip.as_deref() == Some("None") {
        spec.cluster_ips = Some(vec!["None".to_owned()]);
    } else {
        let ips = allocate(&families, &fixed, pools, owner)?;
        spec.cluster_ip = ips.first().map(ToString::to_string);
        spec.cluster_ips = Some(ips.iter().map(ToString::to_string).collect());
    }
    let name = |family: &IpFamily| {
        if *family == IpFamily::V4 {
            "IPv4"
        } else {
            "IPv6"
        }
        .to_owned()
    };
    spec.ip_families = Some(families.iter().map(name).collect());
    let policy = if families.len() == 1 {
        "SingleStack"
    } else {
        "PreferDualStack"
    };
    spec.ip_family_policy
        .get_or_insert_with(|| policy.to_owned());
    spec.type_.get_or_insert_with(|| "ClusterIP".to_owned());
    Ok(())
}

/// The addresses that the manifest sets.
fn fixed_ips(spec: &ServiceSpec) -> Result<Vec<IpAddr>> {
    let listed = spec.cluster_ips.clone().unwrap_or_default();
    let single = spec.cluster_ip.iter().filter(|ip| !listed.contains(ip));
    let all: Vec<&String> = single
        .chain(&listed)
        .filter(|ip| !ip.is_empty() && *ip != "None")
        .collect();
    all.into_iter()
        .map(|ip| {
            ip.parse()
                .with_context(|| format!("spec.clusterIP: {ip:?}"))
        })
        .collect()
}

fn families(spec: &ServiceSpec, fixed: &[IpAddr]) -> Result<Vec<IpFamily>> {
    let listed = spec.ip_families.clone().unwrap_or_default();
    let mut families: Vec<IpFamily> = listed
        .iter()
        .map(|family| family_named(family))
        .collect::<Result<_>>()
        .context("spec.ipFamilies")?;
    for ip in fixed {
        if !families.contains(&IpFamily::of(*ip)) {
            if !listed.is_empty() {
                bail!("spec.clusterIP {ip} is not of the families in spec.ipFamilies");
            }
            families.push(IpFamily::of(*ip));
        }
    }
    if families.is_empty() {
        families.push(IpFamily::V4);
    }
    let is_dual_stack = matches!(
        spec.ip_family_policy.as_deref(),
        Some("PreferDualStack" | "RequireDualStack")
    );
    if is_dual_stack {
        families.extend(
            IpFamily::ALL
                .into_iter()
                .filter(|family| !families.contains(family))
                .collect::<Vec<_>>(),
        );
    }
    Ok(families)
}

fn allocate(
    families: &[IpFamily],
    fixed: &[IpAddr],
    pools: &mut [AddressPool; 2],
    owner: &str,
) -> Result<Vec<IpAddr>> {
    let mut ips = Vec::new();
    for family in families {
        let Some(pool) = pools.iter_mut().find(|pool| pool.family() == *family) else {
            continue;
        };
        match fixed.iter().find(|ip| family.contains(**ip)) {
            Some(ip) => {
                pool.reserve(*ip, owner).context("spec.clusterIP")?;
                ips.push(*ip);
            }
            None => ips.push(pool.allocate(owner)?),
        }
    }
    Ok(ips)
}

#[cfg(test)]
mod tests {
    use super::super::topology::service_pools;
    use super::*;

    fn resolved(spec: &str) -> Result<ServiceSpec> {
        let text = format!("{{metadata: {{name: s}}, spec: {spec}}}");
        let mut service: Service = serde_yaml_ng::from_str(&text).unwrap();
        resolve(&mut service, &mut service_pools(), "service default/s")?;
        Ok(service.spec.unwrap())
    }

    #[test]
    fn default_is_one_ipv4_address() {
        let spec = resolved("{}").unwrap();
        assert_eq!(spec.cluster_ips.unwrap(), ["10.96.0.2"]);
        assert_eq!(spec.ip_families.unwrap(), ["IPv4"]);
    }

    #[test]
    fn dual_stack_has_both_families_in_the_given_order() {
        let spec = resolved("{ipFamilyPolicy: PreferDualStack, ipFamilies: [IPv6]}").unwrap();
        assert_eq!(spec.cluster_ips.unwrap(), ["fd00:10:96::2", "10.96.0.2"]);
        assert_eq!(spec.cluster_ip.unwrap(), "fd00:10:96::2");
    }

    #[test]
    fn explicit_address_is_used_or_refused() {
        let spec = resolved("{clusterIP: 10.96.1.1}").unwrap();
        assert_eq!(spec.cluster_ips.unwrap(), ["10.96.1.1"]);
        assert!(resolved("{clusterIP: 10.1.1.1}").is_err());
        assert!(resolved("{clusterIP: 10.96.1.1, ipFamilies: [IPv6]}").is_err());
        assert!(resolved("{clusterIP: nonsense}").is_err());
    }

    #[test]
    fn headless_service_has_no_address() {
        let spec = resolved("{clusterIP: None, ipFamilyPolicy: RequireDualStack}").unwrap();
        assert_eq!(spec.cluster_ips.unwrap(), ["None"]);
        assert_eq!(spec.ip_families.unwrap().len(), 2);
    }
}
