//! Checks of a request of the matrix: response, access log, plaintext on the wire, and metrics.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use lab::{Lab, Location};

use super::{CLIENT, Cell, Destination, Request, identity};
use crate::access_log;
use crate::detector::Detector;
use crate::metrics::{self, Sample};
use crate::programs::PORT;

/// Checks the response, the source address that the server saw, and each daemon's access-log line.
///
/// # Errors
/// The first check that fails.
pub fn check_request(lab: &Lab, request: &Request) -> Result<()> {
    let expected = format!("{} reply-{}", request.client_ip, request.marker);
    ensure!(
        request.response.body == expected,
        "expected the response {expected:?}, got {:?}",
        request.response.body
    );
    if request.cell.client_meshed {
        check_outbound_line(lab, request).context("the client's daemon")?;
    }
    if request.cell.server_meshed {
        check_inbound_line(lab, request).context("the server's daemon")?;
    }
    Ok(())
}

/// Address and port, with brackets for IPv6.
fn socket(ip: IpAddr, port: u16) -> String {
    SocketAddr::new(ip, port).to_string()
}

fn check_outbound_line(lab: &Lab, request: &Request) -> Result<()> {
    let cell = &request.cell;
    let source = socket(request.client_ip, request.response.local_port);
    let line = access_log::wait(
        lab,
        "a",
        &[("direction", "outbound"), ("src.addr", &source)],
    )?;
    let (sent, received) = (
        request.response.request_bytes,
        request.response.response_bytes,
    );
    let target = socket(request.server_ip, PORT);
    let mut expected = vec![
        ("src.workload", CLIENT.to_owned()),
        ("src.namespace", cell.client_namespace().to_owned()),
        ("dst.workload", cell.server().to_owned()),
        ("dst.namespace", cell.server_namespace().to_owned()),
        ("bytes_sent", sent.to_string()),
        ("bytes_recv", received.to_string()),
        ("error", String::new()),
    ];
    if cell.is_mutual_tls() {
        expected.extend([
            ("src.identity", identity(cell.client_namespace(), CLIENT)),
            (
                "dst.identity",
                identity(cell.server_namespace(), cell.server()),
            ),
            ("dst.addr", socket(request.server_ip, 15008)),
            ("dst.hbone_addr", target),
        ]);
    } else {
        expected.extend([
            ("dst.identity", String::new()),
            ("dst.addr", target),
            ("dst.hbone_addr", String::new()),
        ]);
    }
    if cell.destination == Destination::ClusterIp {
        let host = format!(
            "{}.{}.svc.cluster.local",
            cell.server(),
            cell.server_namespace()
        );
        expected.push(("dst.service", host));
    }
    check_fields(&line, &expected)
}

fn check_inbound_line(lab: &Lab, request: &Request) -> Result<()> {
    let cell = &request.cell;
    // Streams of one tunnel share its source port, so the byte count identifies the request.
    let received = request.response.request_bytes.to_string();
    let wanted = [
        ("direction", "inbound"),
        ("src.workload", CLIENT),
        ("src.namespace", cell.client_namespace()),
        ("dst.workload", cell.server()),
        ("bytes_recv", &received),
    ];
    let line = access_log::wait(lab, cell.server_node(), &wanted)?;
    let target = socket(request.server_ip, PORT);
    let mut expected = vec![
        ("dst.namespace", cell.server_namespace().to_owned()),
        ("bytes_sent", request.response.response_bytes.to_string()),
        ("error", String::new()),
    ];
    if cell.is_mutual_tls() {
        expected.extend([
            ("src.identity", identity(cell.client_namespace(), CLIENT)),
            (
                "dst.identity",
                identity(cell.server_namespace(), cell.server()),
            ),
            ("dst.hbone_addr", target),
        ]);
    } else {
        expected.extend([
            ("src.identity", String::new()),
            (
                "src.addr",
                socket(request.client_ip, request.response.local_port),
            ),
            ("dst.addr", target),
        ]);
    }
    let from = line
        .field("src.addr")
        .parse::<SocketAddr>()
        .context("src.addr")?;
    ensure!(
        from.ip() == request.client_ip,
        "src.addr is {from}, expected the address {}",
        request.client_ip
    );
    check_fields(&line, &expected)
}

fn check_fields(line: &access_log::Entry, expected: &[(&str, String)]) -> Result<()> {
    for (key, value) in expected {
        let found = line.field(key);
        ensure!(
            found == value,
            "{key}={found:?}, expected {value:?}, in: {}",
            line.line
        );
    }
    Ok(())
}

/// Checks the detector's captures: no plaintext of a request between meshed pods, and every other
/// request at each location that it must pass unencrypted.
///
/// # Errors
/// A marker was captured where it must not be, or is absent where it must be.
pub fn check_wire(detector: &Detector, request: &Request) -> Result<()> {
    let cell = &request.cell;
    for marker in [request.marker.clone(), format!("reply-{}", request.marker)] {
        if cell.is_mutual_tls() {
            detector.ensure_unseen(&marker)?;
            continue;
        }
        let occurrences = detector.occurrences(&marker)?;
        let mut locations = vec![Location::node("a"), Location::node(cell.server_node())];
        if !cell.same_node {
            locations.push(Location::Fabric);
        }
        for location in locations {
            ensure!(
                occurrences.at(&location) > 0,
                "{marker} was not captured at {location}, where it passed unencrypted"
            );
        }
    }
    Ok(())
}

/// Checks the metrics of both daemons for all requests of a client and a server: the count, the
/// principals and the security policy.
///
/// # Errors
/// A count or a label differs.
pub fn check_counts(lab: &Lab, cell: &Cell, requests: u32) -> Result<()> {
    if cell.client_meshed {
        check_reporter(lab, "a", "source", cell, requests).context("the client's daemon")?;
    }
    if cell.server_meshed {
        let node = cell.server_node();
        check_reporter(lab, node, "destination", cell, requests).context("the server's daemon")?;
    }
    Ok(())
}

fn check_reporter(lab: &Lab, node: &str, reporter: &str, cell: &Cell, requests: u32) -> Result<()> {
    const CLOSED: &str = "istio_tcp_connections_closed_total";
    const OPENED: &str = "istio_tcp_connections_opened_total";
    let labels = [
        ("reporter", reporter),
        ("source_workload", CLIENT),
        ("source_workload_namespace", cell.client_namespace()),
        ("destination_workload", cell.server()),
        ("destination_workload_namespace", cell.server_namespace()),
    ];
    let requests = f64::from(requests);
    let closed = metrics::wait(lab, node, CLOSED, &labels, requests)?;
    ensure!(
        (closed - requests).abs() < 0.5,
        "{CLOSED}: {closed} for {requests} requests"
    );
    let samples = metrics::scrape(lab, node)?;
    let opened = metrics::sum(&samples, OPENED, &labels);
    ensure!(
        (opened - requests).abs() < 0.5,
        "{OPENED}: {opened} for {requests} requests"
    );
    let samples: Vec<Sample> = samples
        .into_iter()
        .filter(|sample| sample.matches(CLOSED, &labels))
        .collect();
    check_principals(&samples, cell)
}

fn check_principals(samples: &[Sample], cell: &Cell) -> Result<()> {
    let source = identity(cell.client_namespace(), CLIENT);
    let destination = identity(cell.server_namespace(), cell.server());
    let expected: &[(&str, &str)] = if cell.is_mutual_tls() {
        &[
            ("connection_security_policy", "mutual_tls"),
            ("source_principal", &source),
            ("destination_principal", &destination),
            ("response_flags", "-"),
        ]
    } else {
        &[
            ("connection_security_policy", "unknown"),
            ("response_flags", "-"),
        ]
    };
    for sample in samples {
        ensure!(
            sample.matches(&sample.name, expected),
            "expected {expected:?}, found {sample:?}"
        );
        if !cell.client_meshed {
            let principal = sample.labels.get("source_principal").map(String::as_str);
            ensure!(
                principal == Some("unknown"),
                "a principal without a certificate: {sample:?}"
            );
        }
    }
    Ok(())
}
