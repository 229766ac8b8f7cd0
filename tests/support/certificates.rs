//! Certificates and keys for TLS, made by GnuTLS's own tools in the layout that QEMU and libnbd expect.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// An authority, and the folder with its certificates.
pub(crate) struct Authority {
    pub(crate) folder: PathBuf,
}

/// Who is vouched for.
#[derive(Clone, Copy)]
pub(crate) enum Role {
    Server,
    Client,
}

/// What a certificate says beside its role.
pub(crate) struct Says<'a> {
    pub(crate) dns_name: Option<&'a str>,
    pub(crate) ip_address: Option<&'a str>,
    pub(crate) key_type: &'a str,
    pub(crate) expired: bool,
}

impl Default for Says<'_> {
    fn default() -> Self {
        Self {
            dns_name: Some("localhost"),
            ip_address: Some("127.0.0.1"),
            // QEMU wants a key that can encipher keys, which certtool says of no other kind.
            key_type: "rsa",
            expired: false,
        }
    }
}

impl Authority {
    /// Makes an authority in a new folder.
    pub(crate) fn new(folder: impl AsRef<Path>) -> Self {
        let folder = folder.as_ref().to_owned();
        fs::create_dir_all(&folder).unwrap();
        let this = Self { folder };
        this.make_key("ca-key.pem", "rsa");
        let name = this.folder.file_name().unwrap().to_str().unwrap();
        let template = format!("cn = Authority of {name}\nca\ncert_signing_key\ncrl_signing_key\n");
        this.certtool(
            "--generate-self-signed",
            "ca-key.pem",
            &template,
            "ca-cert.pem",
            &[],
        );
        this
    }

    /// Makes an authority that has vouched for a server called `localhost` at 127.0.0.1, and for a client.
    pub(crate) fn with_both(folder: impl AsRef<Path>) -> Self {
        let this = Self::new(folder);
        this.issue(Role::Server, &Says::default());
        this.issue(Role::Client, &Says::default());
        this
    }

    /// Makes a key and a certificate, in the place of those that the folder had.
    pub(crate) fn issue(&self, role: Role, says: &Says<'_>) {
        let name = role.name();
        let key = format!("{name}-key.pem");
        self.make_key(&key, says.key_type);
        let authority = [
            "--load-ca-certificate",
            &self.file("ca-cert.pem"),
            "--load-ca-privkey",
            &self.file("ca-key.pem"),
        ];
        let out = format!("{name}-cert.pem");
        self.certtool(
            "--generate-certificate",
            &key,
            &template(role, says),
            &out,
            &authority,
        );
    }

    /// Makes a server's certificate that nobody vouches for but itself.
    pub(crate) fn issue_self_signed(&self) {
        self.make_key("server-key.pem", "rsa");
        let template = template(Role::Server, &Says::default());
        self.certtool(
            "--generate-self-signed",
            "server-key.pem",
            &template,
            "server-cert.pem",
            &[],
        );
    }

    /// Takes a certificate back: `ca-crl.pem` names it.
    pub(crate) fn revoke(&self, role: Role) {
        let certificate = self.file(&format!("{}-cert.pem", role.name()));
        let more = [
            "--load-ca-certificate",
            &self.file("ca-cert.pem"),
            "--load-ca-privkey",
            &self.file("ca-key.pem"),
            "--load-certificate",
            &certificate,
        ];
        let template = "crl_next_update = 30\ncrl_number = 1\n";
        self.certtool("--generate-crl", "", template, "ca-crl.pem", &more);
    }

    /// Copies files to another folder, which is made.
    pub(crate) fn copy(&self, names: &[&str], to: impl AsRef<Path>) -> PathBuf {
        let to = to.as_ref().to_owned();
        fs::create_dir_all(&to).unwrap();
        for name in names {
            fs::copy(self.folder.join(name), to.join(name)).unwrap();
        }
        to
    }

    /// The path of a file in the folder.
    pub(crate) fn file(&self, name: &str) -> String {
        self.folder.join(name).to_str().unwrap().to_owned()
    }

    /// The folder's path.
    pub(crate) fn path(&self) -> &str {
        self.folder.to_str().unwrap()
    }

    fn make_key(&self, name: &str, key_type: &str) {
        let file = self.file(name);
        let mut args = vec![
            "--generate-privkey",
            "--key-type",
            key_type,
            "--outfile",
            &file,
        ];
        match key_type {
            "ecdsa" => args.extend(["--curve", "secp256r1"]),
            "rsa" => args.extend(["--bits", "2048"]),
            _ => {}
        }
        run("certtool", &args);
    }

    fn certtool(&self, what: &str, key: &str, template: &str, out: &str, more: &[&str]) {
        let info = self.file(&format!("{out}.info"));
        fs::write(&info, template).unwrap();
        let (key, out) = (self.file(key), self.file(out));
        let mut args = vec![what, "--template", &info, "--outfile", &out];
        if what != "--generate-crl" {
            args.extend(["--load-privkey", &key]);
        }
        args.extend(more);
        run("certtool", &args);
    }
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::Server => "server",
            Self::Client => "client",
        }
    }
}

fn template(role: Role, says: &Says<'_>) -> String {
    let mut text = format!(
        "cn = {}\nsigning_key\nencryption_key\ntls_www_{0}\n",
        role.name()
    );
    if let Some(name) = says.dns_name {
        writeln!(text, "dns_name = {name}").unwrap();
    }
    if let Some(address) = says.ip_address {
        writeln!(text, "ip_address = {address}").unwrap();
    }
    if says.expired {
        text += "activation_date = \"2020-01-01 00:00:00 UTC\"\nexpiration_date = \"2021-01-01 00:00:00 UTC\"\n";
    }
    text
}

/// Adds an identity with a new key to a file, as psktool does.
pub(crate) fn add_key(file: &str, identity: &str) {
    run("psktool", &["-u", identity, "-p", file]);
}

fn run(program: &str, args: &[&str]) {
    let run = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output();
    let run = run.unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(
        run.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&run.stderr)
    );
}
