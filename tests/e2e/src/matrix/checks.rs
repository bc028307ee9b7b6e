//! What must be true of each cell, from what curl, the daemons and the wire say.

use anyhow::{Context, Result, ensure};
use lab::{Lab, Location};

use super::{CLIENT, Cell, Destination, Request, identity};
use crate::access_log;
use crate::detector::Detector;
use crate::metrics::{self, Sample};
use crate::programs::PORT;

/// The answer and its source address, and each daemon's line of the access log.
///
/// # Errors
/// The first of them that is not as it must be.
pub fn check_request(lab: &Lab, request: &Request) -> Result<()> {
    let expected = format!("{} reply-{}", request.client_ip, request.marker);
    ensure!(
        request.response.body == expected,
        "the server was to see {expected:?}, and answered {:?}",
        request.response.body
    );
    if request.cell.client_meshed {
        outbound_line(lab, request).context("the client's daemon")?;
    }
    if request.cell.server_meshed {
        inbound_line(lab, request).context("the server's daemon")?;
    }
    Ok(())
}

/// Address and port, with brackets for IPv6.
fn socket(ip: std::net::IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(ip, port).to_string()
}

fn outbound_line(lab: &Lab, request: &Request) -> Result<()> {
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
    if cell.mutual_tls() {
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
        let none = String::new;
        expected.extend([
            ("dst.identity", none()),
            ("dst.addr", target),
            ("dst.hbone_addr", none()),
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
    matches(&line, &expected)
}

fn inbound_line(lab: &Lab, request: &Request) -> Result<()> {
    let cell = &request.cell;
    // Streams of one tunnel share its source port; the byte count names the request.
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
    if cell.mutual_tls() {
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
        .parse::<std::net::SocketAddr>()
        .context("src.addr")?;
    ensure!(
        from.ip() == request.client_ip,
        "src.addr {from}, not of {}",
        request.client_ip
    );
    matches(&line, &expected)
}

fn matches(line: &access_log::Entry, expected: &[(&str, String)]) -> Result<()> {
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

/// What the detector saw: nothing of a request between meshed pods, and all of any other one at
/// every place where it had to pass in clear.
///
/// # Errors
/// A marker was seen where it must not be, or not seen where it must be.
pub fn check_wire(detector: &Detector, request: &Request) -> Result<()> {
    let cell = &request.cell;
    for marker in [request.marker.clone(), format!("reply-{}", request.marker)] {
        if cell.mutual_tls() {
            detector.ensure_unseen(&marker)?;
            continue;
        }
        let seen = detector.occurrences(&marker)?;
        let mut places = vec![Location::node("a"), Location::node(cell.server_node())];
        if !cell.same_node {
            places.push(Location::Fabric);
        }
        for place in places {
            ensure!(
                seen.at(&place) > 0,
                "the detector is blind at {place}: {marker} was not seen"
            );
        }
    }
    Ok(())
}

/// The metrics of both daemons for the requests of a (client, server) pair, one count for each of
/// its cells, with the principals and the security policy that it must have.
///
/// # Errors
/// A count or a label is not as it must be.
pub fn check_counts(lab: &Lab, cell: &Cell, requests: u32) -> Result<()> {
    if cell.client_meshed {
        let counted = counted(lab, "a", "source", cell, requests).context("the client's daemon")?;
        principals(&counted, cell).context("the client's daemon")?;
    }
    if cell.server_meshed {
        let node = cell.server_node();
        let counted = counted(lab, node, "destination", cell, requests);
        let counted = counted.context("the server's daemon")?;
        principals(&counted, cell).context("the server's daemon")?;
    }
    Ok(())
}

/// The series of `istio_tcp_connections_closed_total` of a pair; together they count its requests.
fn counted(
    lab: &Lab,
    node: &str,
    reporter: &str,
    cell: &Cell,
    requests: u32,
) -> Result<Vec<Sample>> {
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
    Ok(samples
        .into_iter()
        .filter(|sample| sample.is(CLOSED, &labels))
        .collect())
}

fn principals(samples: &[Sample], cell: &Cell) -> Result<()> {
    let source = identity(cell.client_namespace(), CLIENT);
    let destination = identity(cell.server_namespace(), cell.server());
    let expected: &[(&str, &str)] = if cell.mutual_tls() {
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
            sample.is(&sample.name, expected),
            "expected {expected:?}, found {sample:?}"
        );
        if !cell.client_meshed {
            let proven = sample.labels.get("source_principal").map(String::as_str);
            ensure!(
                proven == Some("unknown"),
                "an identity that nobody proved: {sample:?}"
            );
        }
    }
    Ok(())
}
