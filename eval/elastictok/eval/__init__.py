"""Metrics, baselines, rate-distortion curves and reports for elastic tokenizers."""

import os

if os.environ.get("ELASTICTOK_TYPECHECK") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("elastictok.eval", "beartype.beartype")

from ._baselines import (
    AbstractBaseline,
    BlockMean,
    ImageMean,
    Patch,
    TransformCoder,
    dct_matrix,
    fit_baselines,
    fit_block_dct,
    fit_patch_pca,
)
from ._charts import Chart, Level, Line, render_chart
from ._comparison import StrategyComparison, StrategyResult
from ._criteria import LPIPSLoss, SSIMLoss, requirement
from ._evaluate import (
    Item,
    Setting,
    Share,
    describe_device,
    evaluate,
    length_settings,
    share_settings,
    threshold_settings,
)
from ._json import to_json, write_json
from ._lpips import LPIPS, VGG16, AbstractFeatures, AlexNet, load_lpips
from ._markdown import format_markdown
from ._metrics import (
    mse,
    mse_per_frame,
    psnr,
    psnr_dataset,
    psnr_per_clip,
    psnr_per_frame,
    ssim_gaussian,
    ssim_gaussian_per_frame,
    ssim_uniform,
    ssim_uniform_per_frame,
)
from ._rates import CodebookUsage, StreamUsage, bits_per_pixel, bpp16, codebook_usage
from ._report import (
    ClipSection,
    PictureSection,
    Report,
    Shot,
    Video,
    render_report,
    write_report,
)
from ._results import (
    Evaluation,
    Measurement,
    Quality,
    Reconstruction,
    Row,
    Sample,
    Satisfaction,
    Spent,
    measure,
    satisfaction_of_fixed,
    satisfaction_of_search,
)
from ._scalar import Quantiser
from ._strategies import Strategy, compare_strategies, spread_thresholds
from ._strategy_summary import cost_chart, strategy_chart, strategy_charts, strategy_table
from ._summary import (
    build_report,
    charts,
    clip_section,
    cost_table,
    picture_section,
    quality_table,
    side_by_side,
)
from ._tables import Table, TableGroup, TableRow, format_table

__all__ = [
    "LPIPS",
    "VGG16",
    "AbstractBaseline",
    "AbstractFeatures",
    "AlexNet",
    "BlockMean",
    "Chart",
    "ClipSection",
    "CodebookUsage",
    "Evaluation",
    "ImageMean",
    "Item",
    "LPIPSLoss",
    "Level",
    "Line",
    "Measurement",
    "Patch",
    "PictureSection",
    "Quality",
    "Quantiser",
    "Reconstruction",
    "Report",
    "Row",
    "SSIMLoss",
    "Sample",
    "Satisfaction",
    "Setting",
    "Share",
    "Shot",
    "Spent",
    "Strategy",
    "StrategyComparison",
    "StrategyResult",
    "StreamUsage",
    "Table",
    "TableGroup",
    "TableRow",
    "TransformCoder",
    "Video",
    "bits_per_pixel",
    "bpp16",
    "build_report",
    "charts",
    "clip_section",
    "codebook_usage",
    "compare_strategies",
    "cost_chart",
    "cost_table",
    "dct_matrix",
    "describe_device",
    "evaluate",
    "fit_baselines",
    "fit_block_dct",
    "fit_patch_pca",
    "format_markdown",
    "format_table",
    "length_settings",
    "load_lpips",
    "measure",
    "mse",
    "mse_per_frame",
    "picture_section",
    "psnr",
    "psnr_dataset",
    "psnr_per_clip",
    "psnr_per_frame",
    "quality_table",
    "render_chart",
    "render_report",
    "requirement",
    "satisfaction_of_fixed",
    "satisfaction_of_search",
    "share_settings",
    "side_by_side",
    "spread_thresholds",
    "ssim_gaussian",
    "ssim_gaussian_per_frame",
    "ssim_uniform",
    "ssim_uniform_per_frame",
    "strategy_chart",
    "strategy_charts",
    "strategy_table",
    "threshold_settings",
    "to_json",
    "write_json",
    "write_report",
]
