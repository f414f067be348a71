"""`cellplane plan`: what a pre-training run would take, before it is started."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cellplane.cli.common import ConfigOption, Json, Overrides, answer, given, table

GIB = 1 << 30


def plan(
    config: ConfigOption = "demo",
    override: Overrides = None,
    shards: Annotated[
        str | None, typer.Option("--shards", help="Folder or URL written by `cellplane data convert`; else cells are assumed.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="h100, a100, l4, ... or cpu: this machine's, measured now.")] = None,
    devices: Annotated[int | None, typer.Option("--devices", min=1, help="How many; default: workers.count.")] = None,
    price_per_hour: Annotated[float | None, typer.Option("--price-per-hour", min=0, help="Of one device, in any currency.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a pre-training run would take. Parameters, memory of a device by ZeRO stage, operations, time, cost and disk."""
    from cellplane.config import load_config
    from cellplane.train.config import PretrainConfig
    from cellplane.train.plan import plan_run

    loaded = load_config(PretrainConfig, config, "pretrain", [*given({"shards": shards}), *(override or [])])
    found = plan_run(loaded, device, devices, price_per_hour).as_dict()
    if as_json:
        answer(found, True)
        return
    answer(_summary(found), False)
    typer.echo()
    table(["memory of a device, GiB", "state", "activations", "runtime", "all", "on the host"], _memory(found))


def _summary(found: dict[str, Any]) -> dict[str, str]:
    """What a person wants to know first."""
    flops, epochs = found["flops_per_cell"], found["epochs"]
    room = "fits" if found["fits"] else "DOES NOT FIT: a higher zero_stage, offload, smaller micro-batches or model.recompute"
    return {
        "parameters": ", ".join(f"{name} {count:,}" for name, count in found["parameters"].items()),
        "operations a cell": f"{flops['forward'] / 1e6:.4g} MFLOP forward, {flops['backward'] / 1e6:.4g} backward",
        "cells": f"{found['cells_per_step']:,} a step, {found['steps']:,} steps" + ("" if epochs is None else f", {epochs:.3g} epochs"),
        "devices": f"{found['devices']} x {found['device']}, ZeRO {found['zero_stage']}: {room}",
        "time": f"{found['hours']:.3g} hours, {found['step_s']:.3g} s a step, {found['cells_per_s']:,.0f} cells/s",
        "cost": "unknown: give --price-per-hour" if found["cost"] is None else f"{found['cost']:,.2f}",
        "disk": f"{found['checkpoint_bytes'] / GIB:.3g} GiB a checkpoint, {found['disk_bytes'] / GIB:.3g} GiB in all",
        "assumed": ", ".join(found["assumed"]) or "nothing: sizes are those of the shards",
    }


def _memory(found: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, sizes in found["memory_bytes"].items():
        chosen = " (configured)" if name == f"zero_{found['zero_stage']}" else ""
        columns = (sizes[key] / GIB for key in ("state", "activations", "runtime", "device", "host"))
        rows.append([f"ZeRO {name[-1]}{chosen}", *(f"{size:.2f}" for size in columns)])
    return rows
