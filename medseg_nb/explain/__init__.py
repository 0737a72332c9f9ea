"What a network looked at: Grad-CAM, codes, attention, a viewer, surfaces in 3D, a report."
from .codes_and_attention import attention_map, code_map, draw_code_map, explore_attention
from .gradcam import cam_score, grad_cam
from .report import write_report
from .surfaces import render_surfaces, surface_mesh
from .viewer import draw_slice, view_volume

__all__ = ["attention_map", "cam_score", "code_map", "draw_code_map", "draw_slice", "explore_attention", "grad_cam", "render_surfaces", "surface_mesh", "view_volume", "write_report"]
