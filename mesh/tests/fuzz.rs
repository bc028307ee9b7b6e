//! Fuzzes the parser, `compile` and `authorize` with mutated manifests: no panic, bounded time.
//!
//! Runs on the stable toolchain for `FUZZ_SECONDS` (default 2) from `FUZZ_SEED` (default 1); a
//! failure prints the seed of its input.

use std::net::{Ipv4Addr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use mesh::objects::{Objects, parse};
use mesh::{InboundConnection, Params, compile};
use spiffe::TrustDomain;

const SEEDS: [&str; 6] = [
    "apiVersion: v1\nkind: Pod\nmetadata:\n  name: web\n  namespace: shop\n  uid: u1\n  labels: \
     {app: web, istio.io/dataplane-mode: ambient}\nspec:\n  nodeName: a\n  containers:\n  - name: \
     main\n    ports: [{name: http, containerPort: 8080}]\n    livenessProbe: {httpGet: {port: \
     http}}\nstatus:\n  phase: Running\n  podIPs: [{ip: 10.0.0.1}, {ip: 'fd00::1'}]\n",
    "---\napiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec:\n  \
     clusterIPs: [10.1.0.1]\n  selector: {app: web}\n  ports: [{name: http, port: 80, targetPort: \
     http}]\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n",
    "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: s, namespace: shop, \
     labels: {kubernetes.io/service-name: web}}\naddressType: IPv4\nports: [{name: http, port: \
     8080}]\nendpoints: [{addresses: [10.0.0.1], targetRef: {kind: Pod, name: web}, conditions: \
     {ready: true}}]\n",
    "base: &a {x: [1, 2]}\n<<: *a\nkind: List\napiVersion: v1\nitems: [{apiVersion: v1, kind: \
     Node, metadata: {name: a}, status: {addresses: [{type: InternalIP, address: 1.2.3.4}]}}]\n",
    "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: n, namespace: \
     shop}\nspec:\n  podSelector: {matchLabels: {app: web}}\n  policyTypes: [Ingress]\n  ingress:\n  \
     - from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}, {namespaceSelector: \
     {matchExpressions: [{key: a, operator: NotIn, values: [b]}]}, podSelector: {}}]\n    ports: \
     [{port: http}, {port: 80, endPort: 90, protocol: TCP}]\n",
    "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: a, \
     namespace: shop}\nspec:\n  action: DENY\n  selector: {matchLabels: {app: web}}\n  rules:\n  - \
     from: [{source: {notPrincipals: ['cluster.local/ns/*'], ipBlocks: [10.0.0.0/8]}}]\n    to: \
     [{operation: {ports: ['8080']}}]\n    when: [{key: source.namespace, notValues: [a*]}]\n---\n\
     apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: p, namespace: \
     shop}\nspec:\n  selector: {matchLabels: {app: web}}\n  mtls: {mode: STRICT}\n  portLevelMtls: \
     {8080: {mode: PERMISSIVE}}\n",
];

const WORDS: [&str; 16] = [
    "---\n",
    "...\n",
    "&a ",
    "*a",
    "<<: ",
    "!!binary ",
    "[",
    "{",
    "}: ",
    "\u{feff}",
    "99999999999",
    "-1",
    ".nan",
    "~",
    "\"",
    "|\n ",
];

#[test]
fn mutated_manifests_neither_panic_nor_hang() {
    let seconds = number("FUZZ_SECONDS", 2);
    let mut seed = number("FUZZ_SEED", 1);
    let trust_domain = TrustDomain::new("cluster.local").unwrap();
    let params = Params::new(trust_domain);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut inputs = 0_u64;
    while Instant::now() < end {
        let input = mutate(&mut fastrand::Rng::with_seed(seed));
        let started = Instant::now();
        let run = catch_unwind(AssertUnwindSafe(|| read(&input, &params)));
        let text = String::from_utf8_lossy(&input);
        assert!(run.is_ok(), "FUZZ_SEED={seed}: panicked on {text:?}");
        let took = started.elapsed();
        assert!(
            took < Duration::from_secs(5),
            "FUZZ_SEED={seed}: {took:?} for {text:?}"
        );
        (seed, inputs) = (seed.wrapping_add(1), inputs + 1);
    }
    assert!(inputs > 100, "only {inputs} inputs in {seconds} s");
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

fn read(input: &[u8], params: &Params) {
    let parsed = parse(&"fuzz.yaml".into(), input);
    let mut objects = Objects::default();
    for (object, origin) in parsed.objects {
        objects.insert(object, origin);
    }
    let (model, diagnostics) = compile(&objects, params);
    for diagnostic in diagnostics
        .iter()
        .chain(&parsed.errors)
        .chain(&parsed.ignored)
    {
        assert!(!diagnostic.to_string().contains('\n'), "{diagnostic:?}");
    }
    for workload in model.workloads() {
        for source in [None, Some(&workload.identity)] {
            let ip = workload.ips.first().copied();
            let ip = ip.unwrap_or(Ipv4Addr::new(10, 0, 0, 1).into());
            // Other tests check the decision; this one only that there is one.
            let _ = model.authorize(
                workload,
                &InboundConnection {
                    source_identity: source,
                    source_ip: ip,
                    source_workload: None,
                    destination: SocketAddr::new(ip, 8080),
                },
            );
        }
        let expected = format!("/ns/{}/sa/{}", workload.namespace, workload.service_account);
        assert_eq!(workload.identity.path(), expected);
        assert_eq!(
            workload.uid.as_str().matches('/').count(),
            5,
            "{}",
            workload.uid
        );
    }
}

fn mutate(rng: &mut fastrand::Rng) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..rng.usize(1..4) {
        bytes.extend_from_slice(SEEDS[rng.usize(..SEEDS.len())].as_bytes());
    }
    for _ in 0..rng.usize(0..12) {
        let at = rng.usize(..=bytes.len());
        let to = (at + rng.usize(0..20)).min(bytes.len());
        match rng.u8(0..6) {
            0 => bytes.truncate(at),
            1 => drop(bytes.drain(at..to)),
            2 => bytes
                .splice(at..at, WORDS[rng.usize(..WORDS.len())].bytes())
                .for_each(drop),
            3 if at < bytes.len() => bytes[at] = rng.u8(..),
            4 => {
                let copy = bytes[at..to].to_vec();
                let target = rng.usize(..=bytes.len());
                bytes.splice(target..target, copy).for_each(drop);
            }
            _ => bytes
                .splice(at..at, (0..rng.usize(0..8)).map(|_| rng.u8(..)))
                .for_each(drop),
        }
    }
    bytes
}
