//! Names by which objects of the mesh refer to each other: objects, workloads, services and
//! container ports.

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use serde::{Serialize, Serializer};

/// Kind, namespace and name of an object. Cluster-scoped objects have an empty namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct ObjectRef {
    /// For example `Service`.
    pub kind: Arc<str>,
    /// Empty for cluster-scoped kinds.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.namespace {
            "" => write!(f, "{} {}", self.kind, self.name),
            namespace => write!(f, "{} {}/{}", self.kind, namespace, self.name),
        }
    }
}

/// Identifies one incarnation of a pod: `<cluster>//Pod/<namespace>/<name>/<metadata.uid>`.
///
/// The Kubernetes uid is part of it: a pod that is recreated under the same name and address is
/// another workload, and no state of the first is used for the second.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkloadUid(Arc<str>);

impl WorkloadUid {
    /// Builds the uid of a pod.
    pub fn of_pod(cluster: &str, namespace: &str, name: &str, kube_uid: &str) -> Self {
        Self(format!("{cluster}//Pod/{namespace}/{name}/{kube_uid}").into())
    }

    /// The uid as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The shared text itself, for example as part of a pool key.
    pub fn to_arc(&self) -> Arc<str> {
        Arc::clone(&self.0)
    }
}

impl From<&str> for WorkloadUid {
    fn from(uid: &str) -> Self {
        Self(uid.into())
    }
}

impl Borrow<str> for WorkloadUid {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for WorkloadUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for WorkloadUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl Serialize for WorkloadUid {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// Namespace and name of a service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceName {
    /// `metadata.namespace`.
    pub namespace: Arc<str>,
    /// `metadata.name`.
    pub name: Arc<str>,
}

impl ServiceName {
    /// Builds a name.
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Serialize for ServiceName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A container port with a name, which a Service or a probe may refer to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct NamedPort {
    /// Name, unique within the pod.
    pub name: Arc<str>,
    /// TCP port.
    pub port: u16,
}
