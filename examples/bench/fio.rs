//! Random reads of an export by fio.

use std::path::Path;

use serde_json::Value;

use super::Fault;
use super::run::run;

/// What random reads came to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    pub(crate) per_second: f64,
    pub(crate) median_ms: f64,
}

/// How an export is read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) depth: u32,
    pub(crate) offset_mib: u64,
    pub(crate) size_mib: u64,
    pub(crate) seconds: u32,
}

/// Reads 4 KiB at random places of a part of an export.
pub(crate) fn random_reads(scratch: &Path, uri: &str, load: Load) -> Result<Rate, Fault> {
    let Load {
        depth,
        offset_mib,
        size_mib,
        seconds,
    } = load;
    let args = [
        "--name=reads".to_owned(),
        "--ioengine=nbd".to_owned(),
        format!("--uri={uri}"),
        "--rw=randread".to_owned(),
        "--bs=4k".to_owned(),
        "--norandommap".to_owned(),
        format!("--iodepth={depth}"),
        format!("--offset={offset_mib}m"),
        format!("--size={size_mib}m"),
        format!("--runtime={seconds}"),
        "--time_based".to_owned(),
        "--output-format=json".to_owned(),
    ];
    let (_, out) = run(scratch, "fio", args)?;
    // fio may say a word about the connection before its JSON.
    let text = String::from_utf8_lossy(&out);
    let json: Value = serde_json::from_str(&text[text.find('{').ok_or("fio says nothing")?..])?;
    let read = &json["jobs"][0]["read"];
    let number = |value: &Value| value.as_f64().ok_or("fio leaves a number out");
    Ok(Rate {
        per_second: number(&read["iops"])?,
        median_ms: number(&read["clat_ns"]["percentile"]["50.000000"])? / 1e6,
    })
}
