//! What follows from the objects: endpoints, DNS names, kube-proxy frontends, object files.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::Result;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;

use super::Cluster;
use crate::model::Key;
use crate::model::endpoints::{self, SERVICE_NAME};
use crate::model::hosts::ServiceAddresses;
use crate::model::kube_proxy::{self, Frontend};
use crate::model::render;
use crate::model::service;

const ZONE: &str = "topology.kubernetes.io/zone";

impl Cluster {
    /// The endpoint slices of a service: those of the controller and those that were applied.
    fn slices_of(&self, key: &Key, service: &Service) -> Vec<EndpointSlice> {
        let mut slices = endpoints::slices(service, self.pods.values(), |node| self.zone(node));
        let applied = self.slices.iter().filter(|(slice, object)| {
            let labels = object.metadata.labels.as_ref();
            slice.0 == key.0 && labels.and_then(|labels| labels.get(SERVICE_NAME)) == Some(&key.1)
        });
        slices.extend(applied.map(|(_, object)| object.clone()));
        slices
    }

    /// The frontends of kube-proxy: one per ClusterIP and port.
    pub(crate) fn frontends(&self) -> Vec<Frontend> {
        let frontends = |(key, service): (&Key, &Service)| {
            let slices = self.slices_of(key, service);
            kube_proxy::frontends(service, &slices.iter().collect::<Vec<_>>())
        };
        self.services.iter().flat_map(frontends).collect()
    }

    /// The addresses of a service's ready endpoints.
    pub(crate) fn ready_endpoints(&self, key: &Key, service: &Service) -> Vec<IpAddr> {
        let mut ips = Vec::new();
        for slice in self.slices_of(key, service) {
            for endpoint in slice.endpoints.into_iter().flatten() {
                if endpoint
                    .conditions
                    .as_ref()
                    .and_then(|c| c.ready)
                    .unwrap_or(true)
                {
                    ips.extend(
                        endpoint
                            .addresses
                            .iter()
                            .filter_map(|ip| ip.parse::<IpAddr>().ok()),
                    );
                }
            }
        }
        ips
    }

    /// The services in every pod's hosts file.
    pub(crate) fn service_addresses(&self) -> Vec<ServiceAddresses> {
        let addresses = |(key, service): (&Key, &Service)| {
            let addresses = if service::is_headless(service) {
                self.ready_endpoints(key, service)
            } else {
                service::cluster_ips(service)
            };
            ServiceAddresses {
                namespace: key.0.clone(),
                name: key.1.clone(),
                addresses,
            }
        };
        self.services.iter().map(addresses).collect()
    }

    /// The object files that the daemons read, by file name.
    pub(crate) fn files(&self) -> Result<BTreeMap<String, String>> {
        let mut files = BTreeMap::new();
        let mut add = |file: Result<(String, String)>| -> Result<()> {
            let (name, text) = file?;
            files.insert(name, text);
            Ok(())
        };
        for (name, entry) in &self.nodes {
            add(render::file(
                "Node",
                "",
                name,
                &render::node(&entry.object, entry.index),
            ))?;
        }
        for (name, namespace) in &self.namespaces {
            add(render::file("Namespace", "", name, namespace))?;
        }
        for ((namespace, name), account) in &self.service_accounts {
            add(render::file("ServiceAccount", namespace, name, account))?;
        }
        for ((namespace, name), entry) in &self.pods {
            add(render::file("Pod", namespace, name, &render::pod(entry)))?;
        }
        for (key, service) in &self.services {
            add(render::file("Service", &key.0, &key.1, service))?;
            for slice in endpoints::slices(service, self.pods.values(), |node| self.zone(node)) {
                let name = slice.metadata.name.clone().unwrap_or_default();
                add(render::file("EndpointSlice", &key.0, &name, &slice))?;
            }
        }
        for ((namespace, name), slice) in &self.slices {
            add(render::file("EndpointSlice", namespace, name, slice))?;
        }
        for ((kind, namespace, name), value) in &self.others {
            add(render::file(kind, namespace, name, value))?;
        }
        Ok(files)
    }

    fn zone(&self, node: &str) -> Option<String> {
        self.nodes
            .get(node)?
            .object
            .metadata
            .labels
            .as_ref()?
            .get(ZONE)
            .cloned()
    }
}
