"""Servers of S3 and Google Cloud Storage on this machine, with one bucket called crab."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import fsspec
import pytest
from etils.epath import backend

from crab_jax.io import buckets, paths


class Bucket:
    """A bucket on a server of this machine: `at` makes its paths, `environment` is what programs need to find it."""

    def __init__(self, kind: str, environment: dict[str, str], server: Any):
        self.kind, self.environment, self.server = kind, environment, server

    def at(self, name: str) -> Any:
        return paths.at(f"{self.kind}://crab/{name}")

    def content(self, name: str) -> bytes:
        """What the server has now, whatever this process has still to write."""
        if self.kind == "gs":
            return self.server.buckets["crab"][name].data
        import boto3

        return boto3.client("s3").get_object(Bucket="crab", Key=name)["Body"].read()

    def upload(self, folder: Path, name: str) -> Any:
        """Copy a folder into the bucket and return its path there."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.at(f"{name}/{file.relative_to(folder).as_posix()}").put(file)
        return self.at(name)


@contextmanager
def serving(kind: str, cache: Path) -> Iterator[Bucket]:
    """Start a server and set the environment for it. cache: folder of copies of objects."""
    if importlib.util.find_spec(buckets.PACKAGES[kind]) is None:
        pytest.skip("the extra is not installed")
    server: Any
    if kind == "gs":
        from tests.programs.gcs import Server

        server = Server("crab")
        environment = server.environment()
    else:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        environment = {
            "AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()),
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    environment["CRAB_JAX_OBJECT_CACHE"] = str(cache)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        if kind == "s3":
            import boto3

            boto3.client("s3").create_bucket(Bucket="crab")
        _renew_forkserver()
        # fsspec and etils keep file systems, and with them the address of an earlier server.
        backend.fsspec_backend._get_filesystem.cache_clear()
        fsspec.get_filesystem_class({"gs": "gcs"}.get(kind, kind)).clear_instance_cache()
        yield Bucket(kind, environment, server)
        server.stop()
    _renew_forkserver()


def _renew_forkserver() -> None:
    """Stop the server that Python forks workers from, whose workers have the environment of its start."""
    forkserver._forkserver._stop()
