"""The engine for a Spark cluster: one job with a task for each unit. Spark places, and repeats what died.

Every machine must see the source and OUT under the same paths, and have this package installed.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from data_prep.engines.cluster import ENVIRONMENT, POLL_SECONDS, RETRIES, check_workers, gave_up, not_installed, work
from data_prep.engines.progress import Progress
from data_prep.work_item import Recipe, Unit, UnitRecord

if TYPE_CHECKING:
    from pyspark import Accumulator

# What came of a unit, sent to the driver when it ends: a Spark job itself says nothing before its last task.
_Results = list[tuple[Unit, UnitRecord | Exception]]


def run(recipe: Recipe, records: Mapping[Unit, UnitRecord | None], workers: int | None) -> None:
    """``run_units`` on the cluster that ``MASTER`` names, or on ``workers`` processes started here."""
    try:
        from py4j.protocol import Py4JJavaError
        from pyspark import AccumulatorParam, SparkConf, SparkContext
        from pyspark.errors import PySparkRuntimeError
    except ImportError as error:
        raise not_installed('spark', 'pyspark<4') from error
    check_workers('MASTER', workers)

    class Appended(AccumulatorParam[_Results]):
        def zero(self, value: _Results) -> _Results:
            return []

        def addInPlace(self, value1: _Results, value2: _Results) -> _Results:
            return value1 + value2

    os.environ.setdefault('PYSPARK_PYTHON', sys.executable)
    conf = SparkConf().setMaster(os.environ.get('MASTER', f'local[{workers or "*"},{RETRIES + 1}]'))
    conf.setAppName('make data').set('spark.ui.enabled', 'false').set('spark.task.maxFailures', str(RETRIES + 1))
    conf.setExecutorEnv(pairs=list(ENVIRONMENT.items()))
    try:
        context = SparkContext(conf=conf)
    except PySparkRuntimeError as error:
        raise ValueError(f'ENGINE: spark cannot be started ({" ".join(str(error).split())}); it needs Java') from error
    context.setLogLevel('OFF')
    try:
        results = context.accumulator(_Results(), Appended())
        with Progress(recipe, records) as progress, ThreadPoolExecutor(1) as thread:
            tasks = context.parallelize(progress.units, len(progress.units))
            job = thread.submit(tasks.foreach, functools.partial(_work, recipe, results))
            done: set[Unit] = set()
            read_bytes = tokens = seen = 0
            ended = False
            try:
                while not ended:
                    ended = bool(wait([job], POLL_SECONDS).done)
                    if ended:
                        job.result()
                    new = results.value[seen:]
                    seen += len(new)
                    for unit, result in new:
                        if isinstance(result, Exception):
                            raise result
                        if unit not in done:  # one that was lost after its end comes twice
                            done.add(unit)
                            read_bytes += unit.bytes
                            tokens += result.tokens
                            progress.add(result)
                    progress.show(read_bytes, tokens)
            finally:
                context.cancelAllJobs()
    except Py4JJavaError as error:
        raise gave_up('Spark', error) from error
    finally:
        context.stop()


def _work(recipe: Recipe, results: Accumulator[_Results], unit: Unit) -> None:
    try:
        results.add([(unit, work(recipe, unit))])
    except (ValueError, OSError) as error:
        # Handed over, not raised: Spark would try bad input as often as it tries again after a death.
        results.add([(unit, error)])
